"""The parts of a model that can be ablated, and their activations."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.errors import RequestError
from llama_ref.formatting import did_you_mean
from llama_ref.study.inputs import seeded
from llama_ref.study.passes.hooks import Pass
from llama_ref.study.patch import Edit

Over = Literal["heads", "kv_groups", "attention", "feed_forward", "layers", "units"]

KINDS: tuple[Over, ...] = get_args(Over)

# Controls are drawn in this order: after any larger parts, the same number of smaller ones is free.
FROM_LARGE: tuple[Over, ...] = ("layers", "attention", "feed_forward", "kv_groups", "heads", "units")


@dataclass(frozen=True)
class Part:
    """A part of one layer: `activations` maps names to the indices of heads or units, or None for all."""

    name: str
    over: Over
    layer: int
    activations: Mapping[str, tuple[int, ...] | None]

    def edits(self, whole: Mapping[str, Edit]) -> dict[str, Edit]:
        """Limit the edits of whole activations to this part, for `patch`."""
        out = {}
        for name, indices in self.activations.items():
            own = whole[name]
            if indices is not None:
                own = _OfUnits(own.change, units=indices, whole=own) if self.over == "units" else own.at(heads=indices)
            out[name] = own
        return out


@dataclass(frozen=True, kw_only=True)
class _OfUnits(Edit):
    """An edit of some units, indices of the last axis."""

    units: tuple[int, ...]
    whole: Edit

    def apply(self, value: Tensor, name: str, run: Pass | None) -> Tensor:
        out = value.clone()
        out[..., list(self.units)] = self.whole.apply(value, name, run)[..., list(self.units)]
        return out


def parts_of(args: ModelArgs, over: Over) -> list[Part]:
    """All parts of a kind, in the model's order. Raises RequestError for an unknown kind."""
    return [part for layer in range(args.n_layers) for part in layer_parts(args, check_kind(over), layer)]


def check_kind(over: str) -> Over:
    """Return the kind. Raises RequestError for an unknown one."""
    for known in KINDS:
        if over == known:
            return known
    raise RequestError(f"over is {over!r:.60}, expected {', '.join(KINDS)}{did_you_mean(str(over), KINDS)}")


def layer_parts(args: ModelArgs, over: Over, layer: int) -> list[Part]:
    """The parts of one layer, such as layers.3.heads.0, layers.3.groups.0, layers.3.attention, layers.3.ffn, layers.3."""
    at, group = f"layers.{layer}", args.n_heads // args.n_kv_heads
    heads, attention, ffn, hidden = (
        f"{at}.{name}" for name in ("attention.head_output", "attention.output", "ffn.output", "ffn.hidden")
    )
    makers: dict[str, Callable[[], list[Part]]] = {
        "heads": lambda: [Part(f"{at}.heads.{i}", "heads", layer, {heads: (i,)}) for i in range(args.n_heads)],
        "kv_groups": lambda: [
            Part(f"{at}.groups.{i}", "kv_groups", layer, {heads: tuple(range(i * group, (i + 1) * group))})
            for i in range(args.n_kv_heads)
        ],
        "attention": lambda: [Part(f"{at}.attention", "attention", layer, {attention: None})],
        "feed_forward": lambda: [Part(f"{at}.ffn", "feed_forward", layer, {ffn: None})],
        "layers": lambda: [Part(at, "layers", layer, {attention: None, ffn: None})],
        "units": lambda: [Part(f"{at}.units.{i}", "units", layer, {hidden: (i,)}) for i in range(args.ffn_dim)],
    }
    return makers[over]()


def named_part(args: ModelArgs, name: str) -> Part:
    """The part with this name. Raises RequestError for a name that the model does not have."""
    kinds = {"heads": "heads", "groups": "kv_groups", "attention": "attention", "ffn": "feed_forward", "units": "units"}
    words = name.split(".") if isinstance(name, str) else []
    if len(words) >= 2 and words[0] == "layers" and words[1].isdecimal() and int(words[1]) < args.n_layers:
        over = kinds.get(words[2]) if len(words) > 2 else "layers"
        for part in layer_parts(args, check_kind(over), int(words[1])) if over else []:
            if part.name == name:
                return part
    raise RequestError(
        f"no part is called {name!r:.60}; names are such as layers.0.heads.1, layers.0.groups.1, layers.0.attention,"
        f" layers.0.ffn, layers.0 and layers.0.units.1, and the model has layers 0 to {args.n_layers - 1}"
    )


class Disjoint:
    """Parts of which no two overlap: none edits another's activation and index, and none lies inside another.

    A head lies inside its kv_group, a group and a head inside the attention, a unit inside the
    feed-forward layer, and all of them inside their layer.
    """

    def __init__(self, parts: Iterable[Part] = ()):
        self._owners: dict[str, dict[int | None, Part]] = {}  # of layers.0.attention or .ffn, by head or unit; None: all
        for part in parts:
            self.add(part)

    def overlapping(self, part: Part) -> Part | None:
        """The first part that overlaps this one, or None."""
        for name, indices in part.activations.items():
            owners = self._owners.get(name.rpartition(".")[0], {})
            for i in list(owners) if indices is None else (None, *indices):
                if i in owners:
                    return owners[i]
        return None

    def add(self, part: Part) -> None:
        """Add a part that overlaps none."""
        for name, indices in part.activations.items():
            owners = self._owners.setdefault(name.rpartition(".")[0], {})
            owners.update(dict.fromkeys((None,) if indices is None else indices, part))


def check_disjoint(parts: Iterable[Part]) -> None:
    """Raise RequestError if two parts overlap."""
    taken = Disjoint()
    for part in parts:
        if other := taken.overlapping(part):
            raise RequestError(f"{other.name} and {part.name} overlap: what both contain can be left out once; name only one")
        taken.add(part)


def draw_parts(args: ModelArgs, like: Sequence[Part], n: int, seed: int) -> list[list[Part]]:
    """Draw `n` random sets of parts, with as many of each kind as `like`. Raises RequestError if there are too few.

    The parts of a set overlap neither those of `like` nor each other.
    """
    if not n:
        return []
    generator, taken = seeded(seed), Disjoint(like)
    counts = {over: count for over in FROM_LARGE if (count := sum(part.over == over for part in like))}
    pools = {over: [part for part in parts_of(args, over) if not taken.overlapping(part)] for over in counts}
    sets = []
    for _ in range(n):
        drawn = Disjoint()
        chosen: list[Part] = []
        for over, pool in pools.items():
            order = torch.randperm(len(pool), generator=generator, device="cpu").tolist()
            free = (pool[i] for i in order if not drawn.overlapping(pool[i]))
            found = list(islice(free, counts[over]))
            if len(found) < counts[over]:
                raise RequestError(
                    f"the parts leave {len(found)} other {over} to draw {counts[over]} controls from: choose fewer"
                )
            for part in found:
                drawn.add(part)
            chosen += found
        sets.append(chosen)
    return sets
