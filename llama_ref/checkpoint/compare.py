"""Are two checkpoints the same model? Tensor by tensor, whatever the number of shards."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.folder import CheckpointFolder, open_folder
from llama_ref.checkpoint.slices import split_dim
from llama_ref.checkpoint.weights import read_shard, release_pages
from llama_ref.tokenizer import read_ranks

TIED_TO = "tok_embeddings.weight"  # an output that is left out is this
BLOCK_VALUES = 1 << 22  # compared at a time, in float64: memory stays small whatever the tensor

Progress = Callable[[int, int], None]  # tensors done, tensors in all


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is not the same. The numbers are None where there is nothing to subtract.

    `max_abs` is the largest absolute difference, `relative_norm` is |a - b| / |a|, `n_different` counts values.
    """

    name: str
    what: str
    max_abs: float | None = None
    relative_norm: float | None = None
    n_different: int | None = None


@dataclass(frozen=True)
class Comparison:
    """What differs between two checkpoints `a` and `b`."""

    a: str
    b: str
    n_tensors: int
    params: list[str] = field(default_factory=list)  # "norm_eps: 1e-05 in a, 1e-06 in b"
    tokenizer: str | None = None
    tensors: list[TensorDifference] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        return not (self.params or self.tokenizer or self.tensors)

    def to_json(self) -> str:
        """For scripts."""
        return json.dumps({"identical": self.identical} | asdict(self), indent=2)


def compare(a: str | Path, b: str | Path, progress: Progress | None = None) -> Comparison:
    """Compare two folders' params, tokenizers and tensors. Shards are put together in passing, a block of values at a time.

    A tied output that one of them leaves out is the embedding. Raises CheckpointError for a folder that cannot be read.
    """
    left, right = open_folder(a), open_folder(b)
    names, tensors = _compare_tensors(_Weights(left), _Weights(right), progress)
    return Comparison(
        str(left.path), str(right.path), names, _compare_params(left, right), _compare_tokenizers(left, right), tensors
    )


def _compare_params(a: CheckpointFolder, b: CheckpointFolder) -> list[str]:
    left, right = ModelArgs.from_json(a.params), ModelArgs.from_json(b.params)
    pairs = ((key.name, getattr(left, key.name), getattr(right, key.name)) for key in fields(ModelArgs))
    return [f"{name}: {mine!r} in a, {yours!r} in b" for name, mine, yours in pairs if mine != yours]


def _compare_tokenizers(a: CheckpointFolder, b: CheckpointFolder) -> str | None:
    if a.tokenizer is None or b.tokenizer is None:
        return None if a.tokenizer is b.tokenizer else f"only {'b' if a.tokenizer is None else 'a'} has one"
    left, right = read_ranks(a.tokenizer), read_ranks(b.tokenizer)
    differing = sum(right.get(token) != rank for token, rank in left.items()) + len(right.keys() - left.keys())
    return f"{differing:,} of {len(left):,} tokens differ" if differing else None


class _Weights:
    """A folder's tensors by name, mapped; each a list of its shards' parts."""

    def __init__(self, folder: CheckpointFolder):
        self.shards = [read_shard(path) for path in folder.shards]

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for shard in self.shards for name in shard))

    def parts(self, name: str) -> list[Tensor]:
        """The parts of a tensor in the shards' order; one only, for those that each shard holds whole; none if it is absent."""
        found = [shard[name] for shard in self.shards if name in shard] or [
            shard[TIED_TO] for shard in self.shards if name == "output.weight" and TIED_TO in shard
        ]
        return found[:1] if split_dim(name) is None else found


def _compare_tensors(a: _Weights, b: _Weights, progress: Progress | None) -> tuple[int, list[TensorDifference]]:
    names = list(dict.fromkeys([*a.names(), *b.names()]))
    out = []
    for done, name in enumerate(names, 1):
        difference = _compare_tensor(name, a.parts(name), b.parts(name))
        if difference:
            out.append(difference)
        if progress:
            progress(done, len(names))
    return len(names), out


def _compare_tensor(name: str, a: list[Tensor], b: list[Tensor]) -> TensorDifference | None:
    if not a or not b:
        return TensorDifference(name, f"only in {'a' if a else 'b'}")
    dim = split_dim(name) or 0
    shapes = [_whole_shape(parts, dim) for parts in (a, b)]
    if shapes[0] != shapes[1]:
        return TensorDifference(name, f"shape {shapes[0]} in a, {shapes[1]} in b")
    dtypes = [str(parts[0].dtype).removeprefix("torch.") for parts in (a, b)]
    what = "values" if dtypes[0] == dtypes[1] else f"{dtypes[0]} in a, {dtypes[1]} in b"
    largest, squares, size, n_different = 0.0, 0.0, 0.0, 0
    for mine, yours in _aligned(a, b, dim):
        if mine.dtype == yours.dtype and torch.equal(mine, yours):
            size += _sum_of_squares(mine)
            continue
        for x, y in _blocks(mine, yours):
            unequal = (x != y) & ~(x.isnan() & y.isnan())
            distance = torch.where(unequal, (x - y).abs(), 0)
            n_different += int(unequal.sum())
            largest = max(largest, distance.max().item()) if not distance.isnan().any() else math.nan
            squares += distance.square().sum().item()
            size += x.square().sum().item()
    for part in (*a, *b):
        release_pages(part)
    if not n_different and what == "values":
        return None
    relative = math.sqrt(squares / size) if size else (math.inf if squares else 0.0)
    return TensorDifference(name, what, largest, relative, n_different)


def _whole_shape(parts: list[Tensor], dim: int) -> tuple[int, ...]:
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return tuple(shape)


def _aligned(a: list[Tensor], b: list[Tensor], dim: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the same places of both, cut wherever a part of either ends."""
    a, b = list(a), list(b)
    while a and b:
        size = min(a[0].shape[dim], b[0].shape[dim])
        yield a[0].narrow(dim, 0, size), b[0].narrow(dim, 0, size)
        for parts in (a, b):
            rest = parts[0].narrow(dim, size, parts[0].shape[dim] - size)
            parts[:1] = [rest] if rest.shape[dim] else []


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of both, a few million values at a time, in float64."""
    rows = max(1, BLOCK_VALUES // max(1, a[0].numel()))
    for x, y in zip(a.split(rows), b.split(rows), strict=True):
        yield x.double(), y.double()


def _sum_of_squares(x: Tensor) -> float:
    return sum(block.square().sum().item() for block, _ in _blocks(x, x))
