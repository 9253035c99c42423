"""Change features while a model runs: edits for `study.patch` that add the change of each feature.

    with study.patch(llama.model, set_features(features, {123: 8.0})):
        llama.generate(…)

The activation becomes x + (f' − f) W_dec: the part that the dictionary does not explain is kept, and tokens
whose features do not change stay bit-identical.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.numbers import plain_number
from llama_ref.study.features.active import Active
from llama_ref.study.features.cross_layer import CrossLayerTranscoder
from llama_ref.study.features.dictionary import Features
from llama_ref.study.inputs import check_index
from llama_ref.study.passes.hooks import Pass
from llama_ref.study.patch import Edit, Indices

Edits = dict[str, Edit]
Change = Callable[[Tensor], Tensor]  # values of the chosen features (…, n) -> the new ones


def set_features(
    features: Features, values: Mapping[int, float], *, positions: Indices | None = None, rows: Indices | None = None
) -> Edits:
    """Set features to these values at every token, or at some positions and rows as in `Edit.at`.

    Raises RequestError for features that do not exist.
    """
    chosen, wanted = _numbers(features, "values", values)
    return _edits(features, chosen, lambda now: wanted.to(now).expand_as(now), positions, rows)


def ablate_features(
    features: Features, chosen: int | Sequence[int], *, positions: Indices | None = None, rows: Indices | None = None
) -> Edits:
    """Prevent features from firing. Raises RequestError for features that do not exist."""
    return _edits(features, chosen_features(features, chosen), torch.zeros_like, positions, rows)


def scale_features(
    features: Features, factors: Mapping[int, float], *, positions: Indices | None = None, rows: Indices | None = None
) -> Edits:
    """Multiply features' values where they fire. Raises RequestError for features that do not exist."""
    chosen, wanted = _numbers(features, "factors", factors)
    return _edits(features, chosen, lambda now: now * wanted.to(now), positions, rows)


def clamp_features(
    features: Features,
    chosen: int | Sequence[int],
    least: float | None = None,
    most: float | None = None,
    *,
    positions: Indices | None = None,
    rows: Indices | None = None,
) -> Edits:
    """Clamp features' values between two bounds, one of which may be None. Raises RequestError."""
    for what, bound in (("least", least), ("most", most)):
        if bound is not None:
            _number(what, bound)
    bounds = [bound for bound in (least, most) if bound is not None]
    if not bounds or bounds != sorted(bounds):
        raise RequestError(f"least is {least!r:.40} and most is {most!r:.40}, expected one bound, or two with least <= most")
    return _edits(features, chosen_features(features, chosen), lambda now: now.clamp(least, most), positions, rows)


def steer_features(
    features: Features, amounts: Mapping[int, float], *, positions: Indices | None = None, rows: Indices | None = None
) -> Edits:
    """Add these amounts of features' directions, regardless of the features' values: nothing is encoded.

    Raises RequestError for features that do not exist.
    """
    chosen, wanted = _numbers(features, "amounts", amounts)
    return _edits(features, chosen, None, positions, rows, wanted)


def replace_by_reconstruction(
    features: Features | CrossLayerTranscoder, *, positions: Indices | None = None, rows: Indices | None = None
) -> Edits:
    """Replace the activation with the dictionary's output: the part that it does not explain is lost.

    A cross-layer transcoder replaces the outputs of all feed-forwards, computed from the features that fire
    in the same pass. Raises RequestError for a single layer of one, which makes only a part of an output.
    """
    if isinstance(features, CrossLayerTranscoder):
        return _replace_all_layers(features, positions, rows)
    if len(features.writes) > 1 or features.weights.decoder.dim() > 2:
        raise RequestError(
            f"{features.path} writes to many layers: one layer of it is not a whole reconstruction; use open_cross_layer"
        )
    return _edits_of(features.reads, features.writes, lambda name, x, value: features.reconstruct(x), positions, rows)


def _replace_all_layers(features: CrossLayerTranscoder, positions: Indices | None, rows: Indices | None) -> Edits:
    local = threading.local()  # .found: the features that fire in the pass so far, by layer

    def replace(name: str, x: Tensor, value: Tensor) -> Tensor:
        layer = features.writes.index(name)
        found: list[Active] = [] if layer == 0 else getattr(local, "found", [])
        local.found = found
        if len(found) != layer:
            raise RequestError(f"a pass skipped layers before {name}, but {features.path} needs all layers: run whole passes")
        found.append(features.layers[layer].active(x))
        return features.decode_layer(layer, found)

    edits: Edits = {}
    for reads, writes in zip(features.reads, features.writes, strict=True):
        edits |= _edits_of(reads, [writes], replace, positions, rows)
    return edits


# ---- edits that need two activations


@dataclass(frozen=True)
class _TokenEdit(Edit):
    """An edit whose function gets only the tokens that it may change: (name, read (n, D), value (n, D)) -> value.

    `read` returns the activation `reads` of the pass, for all tokens; None means the value itself.
    """

    change_tokens: Callable[[str, Tensor, Tensor], Tensor] = field(kw_only=True)
    reads: str = field(kw_only=True)
    read: Callable[[], Tensor] | None = field(kw_only=True)

    def apply(self, value: Tensor, name: str, run: Pass | None) -> Tensor:
        if run is not None and run.layers is not None and int(self.reads.split(".")[1]) not in run.layers:
            raise RequestError(f"a pass leaves out {self.reads}, which the edit of {name} reads: run whole passes")
        mask = self.mask(value, name, run)
        whole = torch.ones((), dtype=torch.bool, device=value.device) if mask is None else mask
        there = whole.expand(*value.shape[:-1], 1)[..., 0]
        if not there.any():
            return value
        read = value if self.read is None else self.read()
        out = value.clone()
        out[there] = self.change_tokens(name, read[there], value[there]).to(value)
        return out


def _edits_of(
    reads: str,
    writes: Sequence[str],
    change_tokens: Callable[[str, Tensor, Tensor], Tensor],
    positions: Indices | None,
    rows: Indices | None,
) -> Edits:
    """Edits that store the activation `reads` of the current pass (per thread), and change the activations `writes`."""
    local = threading.local()

    def see(value: Tensor, name: str) -> Tensor:
        local.seen = value
        return value

    def read() -> Tensor:
        if not hasattr(local, "seen"):
            raise RequestError(f"another pipeline stage computes {reads}, which these edits read: use one stage")
        return local.seen

    same = list(writes) == [reads]
    source = None if same else read
    writing = _TokenEdit(_unchanged, change_tokens=change_tokens, reads=reads, read=source).at(positions=positions, rows=rows)
    return dict.fromkeys(writes, writing) if same else {reads: Edit(see), **dict.fromkeys(writes, writing)}


def _unchanged(value: Tensor, name: str) -> Tensor:
    return value


def _edits(
    features: Features,
    chosen: list[int],
    change: Change | None,
    positions: Indices | None,
    rows: Indices | None,
    amounts: Tensor | None = None,
) -> Edits:
    """Edits that add the change of the chosen features' values times their decoder rows."""
    decoder = features.rows(chosen).unflatten(1, (len(features.writes), -1))  # (n, W, D); only these are read
    place = {name: i for i, name in enumerate(features.writes)}

    def add(name: str, x: Tensor, value: Tensor) -> Tensor:
        if value.shape[-1] != features.dim:
            raise RequestError(f"{name} has {value.shape[-1]} dimensions, but {features.path} has features of {features.dim}")
        if change is None:
            assert amounts is not None
            difference = amounts.to(value.device).expand(*value.shape[:-1], -1)
        else:
            now = features.encode_some(x, chosen)
            difference = change(now) - now
        factor = features.scaling.factors(x.float())[1]
        added = (difference @ decoder[:, place[name]].to(value.device)) * factor
        return torch.where(difference.any(-1, keepdim=True), (value.float() + added).to(value.dtype), value)

    return _edits_of(features.reads, features.writes, add, positions, rows)


# ---- checks


def chosen_features(features: Features, given: int | Sequence[int]) -> list[int]:
    """A list of distinct feature numbers. Raises RequestError, also for a dictionary that is not of one layer."""
    if not isinstance(features, Features):
        of_all = "a cross-layer transcoder: take one of its layers, features.layers[i]"
        what = (
            of_all if isinstance(features, CrossLayerTranscoder) else f"{features!r:.40}, expected what open_features returns"
        )
        raise RequestError(f"features is {what}")
    one = plain_number(given)
    each = [one] if isinstance(one, int) else given
    if isinstance(each, str) or not isinstance(each, Sequence) or not each:
        raise RequestError(f"features are {given!r:.60}, expected the number of one, or a list of them")
    found = [check_index("feature", one, len(features)) for one in each]
    if len(set(found)) < len(found):
        raise RequestError(f"features are {given!r:.60}, which has a duplicate: name each feature once")
    return found


def _numbers(features: Features, what: str, given: Mapping[int, float]) -> tuple[list[int], Tensor]:
    if not isinstance(given, Mapping) or not given:
        raise RequestError(f"{what} is {given!r:.60}, expected numbers by feature, such as {{123: 8.0}}")
    chosen = chosen_features(features, list(given))
    return chosen, torch.tensor([_number(what, value) for value in given.values()], device="cpu")


def _number(what: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not abs(float(value)) < float("inf"):
        raise RequestError(f"{what} has {value!r:.40}, expected a number")
    return float(value)
