"""Interventions: change activations while a model runs.

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
from llama_ref.numbers import is_whole
from llama_ref.parallel.division import whole_args
from llama_ref.study.names import SCORES, axes, broadcastable, is_of_an_image, matching
from llama_ref.study.passes.hooks import Pass, attached, check_part
from llama_ref.study.trace import Trace

Indices = int | Sequence[int]

TOKENS = ("batch", "position", "image", "vision_position")  # axes along which `mean` averages


@dataclass(frozen=True)
class Edit:
    """A change of an activation, made by one of the functions below."""

    change: Callable[[Tensor, str], Tensor]  # (value, name) -> value
    heads: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None

    def at(self, *, heads: Indices | None = None, positions: Indices | None = None, rows: Indices | None = None) -> "Edit":
        """The same edit, limited to these heads, positions and rows.

        `heads` are query heads, or key/value heads for k and v. `positions` count from the beginning of
        the text, also with a cache; -1 is the last token of each text: in generation the prompt's, then
        every new one. `rows` are sequences of the batch. Activations of an image have neither positions nor rows.
        """
        return replace(
            self,
            heads=self.heads if heads is None else check_indices("heads", heads),
            positions=self.positions if positions is None else check_indices("positions", positions),
            rows=self.rows if rows is None else check_indices("rows", rows),
        )

    def over(self, pool: Tensor) -> "Edit":
        """The same edit, but computed from these values (tokens, …) instead of the tokens of the pass."""
        return self

    def apply(self, value: Tensor, name: str, run: Pass | None) -> Tensor:
        """The edited value, of the same shape. Without a pass (`run`), only whole values can be edited, and images'."""
        if run is None and (self.rows or self.positions) and not is_of_an_image(name):
            raise RequestError(
                f"{name} is computed here for other tokens than those of a pass, where an edit cannot be limited to rows or"
                ' positions: leave them out, or read trace(…, "logits")'
            )
        mask = self.mask(value, name, run)
        changed = self.changed(value, name, run)
        return changed if mask is None else torch.where(mask, changed, value)

    def changed(self, value: Tensor, name: str, run: Pass | None) -> Tensor:
        """The value changed everywhere. Raises RequestError if the edit returns another shape."""
        out = self.change(value.clone(), name)  # a clone: a function may write to it, and names may share a tensor
        if not isinstance(out, Tensor) or out.shape != value.shape:
            found = f"a tensor {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise RequestError(f"the edit of {name} returned {found}, expected a tensor {tuple(value.shape)}")
        return out.to(value)

    def mask(self, value: Tensor, name: str, run: Pass | None) -> Tensor | None:
        """Booleans, true where the edit applies, that broadcast to the value; None for everywhere."""
        out = None
        for axis, indices in (("head", self.heads), ("batch", self.rows)):
            if indices is not None:
                there = broadcastable(_index_mask(axis, indices, value, name), name, axis)
                out = there if out is None else out & there
        if self.positions is not None:
            there = broadcastable(self._position_mask(value, name, run, self.positions), name, "batch", "position")
            out = there if out is None else out & there
        kept = _not_padding(value, name, run)
        if out is None or kept is None:
            return kept if out is None else out.to(value.device)
        return out.to(value.device) & kept

    def _position_mask(self, value: Tensor, name: str, run: Pass | None, wanted: tuple[int, ...]) -> Tensor:
        """Which tokens of the pass are at the wanted positions: bool (B, T) or (1, T)."""
        if run is None or "position" not in axes(name):
            raise RequestError(f"{name} has no positions in the text; its axes are {', '.join(axes(name))}")
        T = run.positions.shape[1]
        if value.shape[axes(name).index("position")] != T:
            raise RequestError(f"generation computes {name} only at some positions: edit them without positions")
        if run.cache is None:
            for position in wanted:
                if not -T <= position < T:
                    raise RequestError(f"cannot edit {name} at position {position}: the text has positions 0 to {T - 1}")
        return run.at(wanted)


@dataclass(frozen=True)
class _Swap(Edit):
    source: Trace = field(kw_only=True)

    def changed(self, value: Tensor, name: str, run: Pass | None) -> Tensor:
        if run is None and not is_of_an_image(name):
            raise RequestError(f"{name} is computed here for other tokens than those of a pass: it cannot be swapped")
        if run is None or "position" not in axes(name):
            return _match_shape(name, self.source[name].to(value.device), value).expand_as(value)
        source, there, here = self.source[name], self.source.positions, run.positions
        dim = axes(name).index("position")
        here = here if value.shape[dim] == here.shape[1] else here[:, -1:]  # logits, computed only for the last token
        match = here[:, :, None] == there[:, None].to(here.device)  # (B or 1, T, T of the trace)
        found, columns = match.any(-1), match.int().argmax(-1)
        found_or_kept = found | (here < 0)  # padding
        if self.positions is not None:
            found_or_kept = found_or_kept | ~self._position_mask(value, name, run, self.positions)
        if run.cache is None and not found_or_kept.all():
            row = int((~found_or_kept).any(-1).int().argmax())
            n_there, n_here = (int((each[row if len(each) > 1 else 0] >= 0).sum()) for each in (there, here))
            raise RequestError(
                f"cannot swap {name} from a trace of {n_there} tokens into a text of {n_here}: trace a text of "
                "the same length, or choose positions with .at(positions=…)"
            )
        source = _match_shape(name, source.to(value.device), value)
        index = broadcastable(columns, name, "batch", "position")
        index = index.expand(len(value), *value.shape[1:dim], -1, *source.shape[dim + 1 :])
        swapped = source.expand(len(value), *source.shape[1:]).gather(dim, index)
        return torch.where(broadcastable(found, name, "batch", "position"), swapped.to(value), value)


@dataclass(frozen=True)
class _Mean(Edit):
    def over(self, pool: Tensor) -> Edit:
        return set_to(pool.float().mean(0)).at(heads=self.heads, positions=self.positions, rows=self.rows)

    def changed(self, value: Tensor, name: str, run: Pass | None) -> Tensor:
        if name.endswith(".scores"):
            raise RequestError(f"{name} has no mean: it is -inf where masked; take the pattern's, or scale(0)")
        dims = [dim for dim, axis in enumerate(axes(name)) if axis in TOKENS]
        kept = _not_padding(value, name, run)
        if kept is None:
            out = value.float().mean(dims, keepdim=True)
        else:
            out = torch.where(kept, value.float(), 0).sum(dims, keepdim=True) / kept.sum()
        return out.expand_as(value).to(value)


def _not_padding(value: Tensor, name: str, run: Pass | None) -> Tensor | None:
    """Booleans, false at padding, that broadcast to the value; None if there is no padding."""
    if run is None or run.padding is None or "position" not in axes(name):
        return None
    if value.shape[axes(name).index("position")] != run.padding.shape[1]:
        return None
    return broadcastable(~run.padding, name, "batch", "position").to(value.device)


def _match_shape(name: str, source: Tensor, value: Tensor) -> Tensor:
    """Pad or cut a trace's value to the keys of this pass. Raises RequestError for other shapes."""
    if axes(name) == SCORES:
        more = value.shape[-1] - source.shape[-1]  # the difference is masked
        source = F.pad(source, (0, more))
    first, *others = axes(name)
    same = [source.shape[i] == value.shape[i] for i, axis in enumerate(others, 1) if axis != "position"]
    if not all(same) or len(source) not in (1, len(value)):
        what = "images of the same tiles" if first == "image" else "as many rows"
        raise RequestError(
            f"{name} is {tuple(value.shape)} here, but {tuple(source.shape)} in the trace to swap from: use a trace of the "
            f"same model with {what}, or with one"
        )
    return source


# ---- the edits


def edit(function: Callable[[Tensor], Tensor]) -> Edit:
    """Replace the value by a function of it. (`patch` takes a bare function too.)"""
    if not callable(function):
        raise RequestError(f"an edit is {function!r:.60}, expected a function of a tensor, or one of zero(), scale(2) …")
    return Edit(lambda value, name: function(value))


def as_edit(given: Edit | Callable[[Tensor], Tensor]) -> Edit:
    """Return an Edit unchanged, or make one from a function. Raises RequestError for anything else."""
    return given if isinstance(given, Edit) else edit(given)


def zero() -> Edit:
    """Replace the value by zero. Zeroed scores attend evenly to all visible tokens."""
    return Edit(lambda value, name: torch.zeros_like(value))


def scale(factor: float) -> Edit:
    """Multiply the value by a number."""
    if isinstance(factor, bool) or not isinstance(factor, Real):
        raise RequestError(f"factor is {factor!r:.40}, expected a number")
    return Edit(lambda value, name: value * float(factor))


def mean() -> Edit:
    """Replace the value by its mean over the batch and positions of a pass: mean ablation."""
    return _Mean(lambda value, name: value)


def set_to(tensor: Tensor | float) -> Edit:
    """Replace the value by a tensor or number that broadcasts to its shape."""
    try:
        given = torch.as_tensor(tensor)
    except (TypeError, ValueError, RuntimeError):
        raise RequestError(f"set_to was given {tensor!r:.60}, expected a tensor or a number") from None

    def change(value: Tensor, name: str) -> Tensor:
        try:
            return given.to(value).expand_as(value)
        except RuntimeError:
            raise RequestError(
                f"cannot set {name} to a tensor {tuple(given.shape)}, expected a shape that broadcasts to {tuple(value.shape)}"
            ) from None

    return Edit(change)


def swap_from(source: Trace) -> Edit:
    """Replace the value by a trace's value at the same position.

    The trace has as many rows as the batch, or a single row, which is used for all. With a cache,
    positions that are not in the trace stay unchanged.
    """
    if not isinstance(source, Trace):
        raise RequestError(f"swap_from was given a {type(source).__name__}, expected a Trace")
    return _Swap(lambda value, name: value, source=source)


# ---- applied to a model


@contextmanager
def patch(model: Transformer, edits: Mapping[str, Edit | Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Change activations in the block, in this thread: {name or glob: edit or function}.

    A trace or recording in the block sees the changed values. Several edits of one name, in one
    patch or in nested ones, apply in order. Edited scores are masked again. Edited keys and values
    stay in a cache. Under torchrun all processes must make the same edits; each is applied to whole
    values. Raises RequestError for names that match nothing, and during the pass for edits that do not
    fit the activation.
    """
    check_part(model)
    if not isinstance(edits, Mapping):
        raise RequestError(f"edits is {edits!r:.60}, expected a dictionary such as {{'layers.0.attention.output': zero()}}")
    by_name: dict[str, list[Edit]] = {}
    for glob, change in edits.items():
        change = as_edit(change)
        for name in matching(whole_args(model), glob):
            if isinstance(change, _Swap):
                change.source[name]  # raises now, not during a pass
            by_name.setdefault(name, []).append(change)
    with attached(model, _Editor(by_name)):
        yield


class _Editor:
    """A visitor that applies edits."""

    edits, in_path = True, False

    def __init__(self, by_name: dict[str, list[Edit]]):
        self.by_name = by_name

    def wants(self, name: str) -> bool:
        return name in self.by_name

    def begin(self, run: Pass | None) -> None:
        pass

    def visit(self, name: str, value: Tensor, run: Pass | None) -> Tensor:
        for change in self.by_name[name]:
            value = change.apply(value, name, run)
        return value


# ---- heads, positions, rows


def check_indices(what: str, given: Indices) -> tuple[int, ...]:
    """Return the indices. Raises RequestError unless they are a whole number or a list of them."""
    found = (given,) if isinstance(given, Integral) else given
    if not isinstance(found, Sequence) or not all(map(is_whole, found)):
        raise RequestError(f"{what} is {given!r:.60}, expected a whole number or a list of them")
    return tuple(int(i) for i in found)


def _index_mask(axis: str, indices: tuple[int, ...], value: Tensor, name: str) -> Tensor:
    """Booleans along one axis, true at the indices. Raises RequestError if one is out of range."""
    what = "row" if axis == "batch" else axis
    if axis not in axes(name):
        raise RequestError(f"{name} has no {what}s; its axes are {', '.join(axes(name))}")
    count = value.shape[axes(name).index(axis)]
    for i in indices:
        if not -count <= i < count:
            raise RequestError(f"cannot edit {name} at {what} {i}: it has {what}s 0 to {count - 1}")
    out = torch.zeros(count, dtype=torch.bool, device="cpu")
    out[list(indices)] = True
    return out
