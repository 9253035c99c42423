"""Interventions: activations changed while a model runs.

with patch(model, {"layers.5.attention.head_output": zero().at(heads=[3, 7])}):
    llama.generate(…)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.study.hooks import Pass, attached, check_model
from llama_ref.study.names import LOOKS, axes, matching
from llama_ref.study.trace import Trace

Places = int | Sequence[int]


@dataclass(frozen=True)
class Edit:
    """A change of an activation, everywhere or at some places: see the functions below that make one."""

    change: Callable[[Tensor, str], Tensor]  # (value, name) -> value
    heads: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None

    def at(self, *, heads: Places | None = None, positions: Places | None = None, rows: Places | None = None) -> "Edit":
        """The same, at these places alone.

        `heads` are query heads, or key/value heads for k and v. `positions` count from the text's beginning, with a cache too;
        -1 is the last token of a pass. `rows` are sequences of the batch.
        """
        given = {"heads": heads, "positions": positions, "rows": rows}
        return replace(self, **{what: _indices(what, places) for what, places in given.items() if places is not None})

    def apply(self, value: Tensor, name: str, run: Pass) -> Tensor:
        """The value that takes another's place, of the same shape."""
        places = self.places(value, name, run)
        changed = self.changed(value, name, run)
        return changed if places is None else torch.where(places, changed, value)

    def changed(self, value: Tensor, name: str, run: Pass) -> Tensor:
        """The value changed everywhere. Raises RequestError where that is no value for its place."""
        out = self.change(value.clone(), name)  # a clone: other names may be the same tensor, and a function may write to it
        if not isinstance(out, Tensor) or out.shape != value.shape:
            found = f"a tensor {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise RequestError(f"the edit of {name} gave {found}, expected the value's own shape, {tuple(value.shape)}")
        return out.to(value)

    def places(self, value: Tensor, name: str, run: Pass) -> Tensor | None:
        """Where the edit acts, as booleans that broadcast to the value; None for everywhere."""
        out = None
        for axis, chosen in (("head", self.heads), ("batch", self.rows)):
            if chosen is not None:
                there = _along(_chosen(axis, chosen, value, name), name, axis)
                out = there if out is None else out & there
        if self.positions is not None:
            there = _along(self._at_positions(value, name, run, self.positions), name, "batch", "position")
            out = there if out is None else out & there
        return None if out is None else out.to(value.device)

    def _at_positions(self, value: Tensor, name: str, run: Pass, wanted: tuple[int, ...]) -> Tensor:
        """(B, T) or (1, T)."""
        positions = run.positions
        T = positions.shape[1]
        if value.shape[axes(name).index("position")] != T:
            raise RequestError(f"{name} are made for some positions only in generation: edit them without positions")
        if run.cache is None:
            for position in wanted:
                if not -T <= position < T:
                    raise RequestError(f"{name} was to be edited at position {position}, but the text has 0 to {T - 1}")
        chosen = torch.tensor(wanted, device=positions.device)
        chosen = torch.where(chosen < 0, positions[:, -1:] + 1 + chosen, chosen)  # (B or 1, n)
        return (positions[:, :, None] == chosen[:, None]).any(-1)


@dataclass(frozen=True)
class _Swap(Edit):
    source: Trace = field(kw_only=True)

    def changed(self, value: Tensor, name: str, run: Pass) -> Tensor:
        source, there, here = self.source[name], self.source.positions, run.positions
        dim = axes(name).index("position")
        here = here if value.shape[dim] == here.shape[1] else here[:, -1:]  # logits, where only the last token's are made
        match = here[:, :, None] == there[:, None].to(here.device)  # (B or 1, T, T of the trace)
        found, columns = match.any(-1), match.int().argmax(-1)
        there_or_kept = found
        if self.positions is not None:
            there_or_kept = found | ~self._at_positions(value, name, run, self.positions)
        if run.cache is None and not there_or_kept.all():
            raise RequestError(
                f"{name} was to come from a trace of {there.shape[1]} tokens into a text of {here.shape[1]}: trace one as "
                "long, or say where with .at(positions=…)"
            )
        source = _fitting(name, source.to(value.device), value)
        index = _along(columns, name, "batch", "position").expand(len(value), *value.shape[1:dim], -1, *source.shape[dim + 1 :])
        swapped = source.expand(len(value), *source.shape[1:]).gather(dim, index)
        return torch.where(_along(found, name, "batch", "position"), swapped.to(value), value)


def _fitting(name: str, source: Tensor, value: Tensor) -> Tensor:
    """A trace's value with as many keys as there are here. Raises RequestError where it is of another batch or model."""
    if axes(name) == LOOKS:
        more = value.shape[-1] - source.shape[-1]  # those beyond were or are not yet there, and seen by none
        source = F.pad(source, (0, more))
    dim = axes(name).index("position")
    same = [source.shape[i] == value.shape[i] for i in range(1, value.dim()) if i != dim]
    if not all(same) or len(source) not in (1, len(value)):
        raise RequestError(
            f"{name} is {tuple(value.shape)} here, but {tuple(source.shape)} in the trace that it was to come from: take one "
            "of the same model with as many rows, or with one"
        )
    return source


# ---- the edits


def edit(function: Callable[[Tensor], Tensor]) -> Edit:
    """What a function makes of the value, for `.at(…)`; `patch` takes a bare function as well."""
    if not callable(function):
        raise RequestError(f"an edit is {function!r:.60}, expected a function of a tensor, or one of zero(), scale(2) …")
    return Edit(lambda value, name: function(value))


def zero() -> Edit:
    """Zero. Zeroed scores look evenly at all that may be seen; a zeroed pattern at nothing."""
    return Edit(lambda value, name: torch.zeros_like(value))


def scale(factor: float) -> Edit:
    """The value times a number."""
    if isinstance(factor, bool) or not isinstance(factor, Real):
        raise RequestError(f"factor is {factor!r:.40}, expected a number")
    return Edit(lambda value, name: value * float(factor))


def mean() -> Edit:
    """The mean over the batch and the positions of a pass, in place of each: what is special about a token is gone."""
    return Edit(_mean)


def _mean(value: Tensor, name: str) -> Tensor:
    if name.endswith(".scores"):
        raise RequestError(f"{name} has no mean: it is -inf where a token may not look; take the pattern's, or scale(0)")
    dims = [axes(name).index(axis) for axis in ("batch", "position")]
    return value.float().mean(dims, keepdim=True).expand_as(value)


def set_to(tensor: Tensor | float) -> Edit:
    """A tensor or number that broadcasts to the value's shape."""
    try:
        given = torch.as_tensor(tensor)
    except (TypeError, ValueError, RuntimeError):
        raise RequestError(f"set_to was given {tensor!r:.60}, expected a tensor or a number") from None

    def change(value: Tensor, name: str) -> Tensor:
        try:
            return given.to(value).expand_as(value)
        except RuntimeError:
            raise RequestError(
                f"{name} was to be set to a tensor {tuple(given.shape)}, expected {tuple(value.shape)} or what broadcasts to it"
            ) from None

    return Edit(change)


def swap_from(source: Trace) -> Edit:
    """The value that another run's trace has at the same position.

    The trace has the batch's rows, or one row for all. While a cache grows, positions that the trace has not stay as they are.
    """
    if not isinstance(source, Trace):
        raise RequestError(f"swap_from was given a {type(source).__name__}, expected a Trace")
    return _Swap(lambda value, name: value, source=source)


# ---- put onto a model


@contextmanager
def patch(model: Transformer, edits: Mapping[str, Edit | Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Change activations while the block lasts, in this thread: {name or glob: edit, or a function value -> value}.

    A trace or recording in the block sees what was changed. Edits of one name, in one patch or in patches within patches, act
    in their order. Edited scores keep the future hidden, and edited keys and values go into a cache and stay there. Raises
    RequestError for names that match nothing, and in the pass for edits that do not fit.
    """
    check_model(model)
    if not isinstance(edits, Mapping):
        raise RequestError(f"edits is {edits!r:.60}, expected a dictionary such as {{'layers.0.attention.output': zero()}}")
    by_name: dict[str, list[Edit]] = {}
    for glob, change in edits.items():
        change = change if isinstance(change, Edit) else edit(change)
        for name in matching(model.args, glob):
            if isinstance(change, _Swap):
                change.source[name]  # raises now, not in the middle of a pass
            by_name.setdefault(name, []).append(change)
    with attached(model, _Editor(by_name)):
        yield


class _Editor:
    """A visitor that changes what it sees."""

    edits, in_path = True, False

    def __init__(self, by_name: dict[str, list[Edit]]):
        self.by_name = by_name

    def wants(self, name: str) -> bool:
        return name in self.by_name

    def begin(self, run: Pass) -> None:
        pass

    def visit(self, name: str, value: Tensor, run: Pass) -> Tensor:
        for change in self.by_name[name]:
            value = change.apply(value, name, run)
        return value


# ---- places


def _indices(what: str, places: Places) -> tuple[int, ...]:
    found = (places,) if isinstance(places, Integral) else places
    if not isinstance(found, Sequence) or not all(isinstance(i, Integral) and not isinstance(i, bool) for i in found):
        raise RequestError(f"{what} is {places!r:.60}, expected a whole number or a list of them")
    return tuple(int(i) for i in found)


def _chosen(axis: str, chosen: tuple[int, ...], value: Tensor, name: str) -> Tensor:
    """Booleans along an axis of the value. Raises RequestError for places that it has not."""
    what = "row" if axis == "batch" else axis
    if axis not in axes(name):
        raise RequestError(f"{name} has no heads to choose among; its axes are {', '.join(axes(name))}")
    count = value.shape[axes(name).index(axis)]
    for i in chosen:
        if not -count <= i < count:
            raise RequestError(f"{name} was to be edited at {what} {i}, but has {what}s 0 to {count - 1}")
    out = torch.zeros(count, dtype=torch.bool)
    out[list(chosen)] = True
    return out


def _along(tensor: Tensor, name: str, *its_axes: str) -> Tensor:
    """A tensor of some axes of an activation, with a dimension of 1 for each of the others."""
    sizes = dict(zip(its_axes, tensor.shape, strict=True))
    return tensor.reshape([sizes.get(axis, 1) for axis in axes(name)])
