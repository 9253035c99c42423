"""Compare two checkpoints: params, tokenizer, and every tensor, in any number of shards."""

import ctypes
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from llama_ref.args import MOST_TILES, ModelArgs
from llama_ref.checkpoint.folder import CheckpointFolder, open_folder
from llama_ref.checkpoint.hf.layout import is_tile_table
from llama_ref.checkpoint.hf.tokenizer import read_tokenizer_json
from llama_ref.checkpoint.hf.vision.tile_tables import in_grids
from llama_ref.checkpoint.meta_quantized.dequantized import Dequantized, open_weights
from llama_ref.checkpoint.meta_quantized.kinds import Kind
from llama_ref.checkpoint.reader import Stored, TensorSlice, open_stored, release_rows, stored_kind
from llama_ref.errors import CheckpointError
from llama_ref.formatting import dtype_name
from llama_ref.parallel.sharding import split_dim
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.vocabulary import padded, read_tokenizer_model

FFN_FORMULA = {"multiple_of", "ffn_dim_multiplier", "hidden_dim"}  # compared as ffn_dim
BLOCK_VALUES = 1 << 20  # compared at a time, to bound memory


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that differs. The numbers are None if the shapes differ or one tensor is missing.

    `max_abs` is the largest absolute difference, `relative_norm` is |a - b| / |a|, `n_different`
    counts values. A NaN equals a NaN; if only one value is NaN, the first two numbers are NaN.
    """

    name: str
    what: str
    max_abs: float | None = None
    relative_norm: float | None = None
    n_different: int | None = None


@dataclass(frozen=True)
class Comparison:
    """The differences between two checkpoints `a` and `b`."""

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
        """The comparison as JSON; "nan" and "inf" are strings, as JSON has no such numbers."""
        tensors = [{key: _json_number(value) for key, value in asdict(tensor).items()} for tensor in self.tensors]
        return json.dumps({"identical": self.identical} | asdict(self) | {"tensors": tensors}, indent=2)


def _json_number(value: str | float | None) -> str | float | None:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def compare(a: str | Path, b: str | Path, progress: Progress | None = None) -> Comparison:
    """Compare two folders' params, tokenizers and tensors, a block of values at a time.

    A tied output that one folder leaves out counts as the embedding. Hugging Face's files lack the
    vectors for tiles that no image uses; if only one folder has that format, these vectors are not
    compared. `progress` counts tensors.
    Raises CheckpointError for a folder that cannot be read.
    """
    left, right = open_folder(a), open_folder(b)
    for folder in (left, right):
        if folder.is_quantized:
            raise CheckpointError(f"{folder.path} is quantized, and cannot be compared: use the folder that it was made from")
    params, tokenizer = _compare_params(left, right), _compare_tokenizers(left, right)
    mine, yours = _open(left, right)
    n_tensors, tensors = _compare_tensors(mine, yours, progress)
    return Comparison(str(left.path), str(right.path), n_tensors, params, tokenizer, tensors)


def _open(*folders: CheckpointFolder) -> list[Stored | Dequantized]:
    """Open the folders' tensors: dequantized, unless all folders store them in the same way.

    fp8 releases keep their scales in separate files, so they are always dequantized.
    """
    args = [folder.read_args() for folder in folders]
    kinds = [stored_kind(folder, each) for folder, each in zip(folders, args, strict=True)]
    is_as_stored = len(set(kinds)) == 1 and Kind.FP8 not in kinds
    return [
        open_stored(folder, each, check=False) if is_as_stored or kind is Kind.PLAIN else open_weights(folder, each)
        for folder, each, kind in zip(folders, args, kinds, strict=True)
    ]


def _compare_params(a: CheckpointFolder, b: CheckpointFolder) -> list[str]:
    left, right = a.read_args(), b.read_args()
    ignored = FFN_FORMULA | ({"extra"} if a.is_hugging_face != b.is_hugging_face else set())
    names = [key.name for key in fields(ModelArgs) if key.name not in ignored] + ["ffn_dim"]
    pairs = ((name, getattr(left, name), getattr(right, name)) for name in names)
    return [f"{name}: {mine!r} in a, {yours!r} in b" for name, mine, yours in pairs if mine != yours]


def _compare_tokenizers(a: CheckpointFolder, b: CheckpointFolder) -> str | None:
    if a.tokenizer is None or b.tokenizer is None:
        return None if a.tokenizer is b.tokenizer else f"only {'b' if a.tokenizer is None else 'a'} has one"
    left, right = _ids(a.tokenizer, a.read_args().vocab_size), _ids(b.tokenizer, b.read_args().vocab_size)
    differing = sum(right.get(token) != rank for token, rank in left.items()) + len(right.keys() - left.keys())
    return f"{differing:,} of {len(left):,} tokens differ" if differing else None


def _ids(tokenizer: Path, vocab_size: int) -> dict[bytes | str, int]:
    """The id of every token: byte pairs as bytes, special and added tokens as text."""
    if tokenizer.suffix == ".json":
        vocabulary = padded(tokenizer, read_tokenizer_json(tokenizer).without_beyond(vocab_size), vocab_size)
    else:
        vocabulary = read_tokenizer_model(tokenizer)
    return vocabulary.ranks | vocabulary.special | vocabulary.added


def _compare_tensors(
    a: Stored | Dequantized, b: Stored | Dequantized, progress: Progress | None
) -> tuple[int, list[TensorDifference]]:
    names = list(dict.fromkeys([*a.names(), *b.names()]))
    out = []
    counter = ProgressCounter(len(names), progress)
    for name in names:
        difference = _compare_tensor(name, *(_used(name, parts, a, b) for parts in (_parts(a, name), _parts(b, name))))
        if difference:
            out.append(difference)
        counter.advance()
    return len(names), out


def _parts(stored: Stored | Dequantized, name: str) -> list[TensorSlice]:
    """The shards' parts of a tensor; only one if every shard holds the same whole tensor."""
    parts = stored.parts(name)
    is_whole = split_dim(name) is None and all(_same(parts[0], other) for other in parts[1:])
    return parts[:1] if is_whole else parts


def _used(name: str, parts: list[TensorSlice], a: Stored | Dequantized, b: Stored | Dequantized) -> list[TensorSlice]:
    """The part of a tensor that both formats hold."""
    formats = {isinstance(stored, Stored) and stored.hf_args is not None for stored in (a, b)}
    if len(formats) == 1 or not is_tile_table(name):
        return parts
    fits = all(part.tensor.dim() == 4 and len(part.tensor) <= MOST_TILES for part in parts)
    return [replace(part, tensor=in_grids(part.tensor)) for part in parts] if fits else parts


def _compare_tensor(name: str, a: list[TensorSlice], b: list[TensorSlice]) -> TensorDifference | None:
    if not a or not b:
        return TensorDifference(name, f"only in {'a' if a else 'b'}")
    if split_dim(name) is None and len(a) != len(b):
        return TensorDifference(name, f"the shards of {'a' if len(a) > 1 else 'b'} disagree about it")
    dim = split_dim(name) or 0
    shapes = [_whole_shape(parts, dim) for parts in (a, b)]
    if shapes[0] != shapes[1]:
        return TensorDifference(name, f"shape {shapes[0]} in a, {shapes[1]} in b")
    dtypes = [_dtypes(parts) for parts in (a, b)]
    if dtypes[0] == dtypes[1] and all(_same(mine, yours) for mine, yours in _aligned(a, b, dim)):
        return None
    what = "values" if dtypes[0] == dtypes[1] else f"{dtypes[0]} in a, {dtypes[1]} in b"
    return TensorDifference(name, what, *_distance(_aligned(a, b, dim)))


def _whole_shape(parts: list[TensorSlice], dim: int) -> tuple[int, ...] | str:
    """The shape of the concatenated parts, or their shapes as text if they do not fit together."""
    shapes = [list(part.tensor.shape) for part in parts]
    around = [shape[:dim] + shape[dim + 1 :] for shape in shapes]
    if len(parts) == 1:
        return tuple(shapes[0])
    if any(len(shape) <= dim for shape in shapes) or any(other != around[0] for other in around):
        return " and ".join(str(tuple(shape)) for shape in shapes)
    shapes[0][dim] = sum(shape[dim] for shape in shapes)
    return tuple(shapes[0])


def _dtypes(parts: list[TensorSlice]) -> str:
    return " and ".join(dict.fromkeys(dtype_name(part.tensor.dtype) for part in parts))


def _aligned(a: list[TensorSlice], b: list[TensorSlice], dim: int) -> Iterator[tuple[TensorSlice, TensorSlice]]:
    """Views of the same ranges of both tensors, split wherever a part of either ends."""
    if len(a) == len(b) and all(mine.tensor.shape == yours.tensor.shape for mine, yours in zip(a, b, strict=True)):
        yield from zip(a, b, strict=True)
        return
    a, b = list(a), list(b)
    while a and b:
        size = min(a[0].tensor.shape[dim], b[0].tensor.shape[dim])
        yield _narrow(a[0], dim, 0, size), _narrow(b[0], dim, 0, size)
        for parts in (a, b):
            rest = _narrow(parts[0], dim, size, parts[0].tensor.shape[dim] - size)
            parts[:1] = [rest] if rest.tensor.shape[dim] else []


def _narrow(part: TensorSlice, dim: int, start: int, length: int) -> TensorSlice:
    return replace(part, tensor=part.tensor.narrow(dim, start, length))


def _same(a: TensorSlice, b: TensorSlice) -> bool:
    """Whether two tensors have the same shape, dtype and values, where a NaN equals a NaN."""
    if a.tensor.dtype != b.tensor.dtype or a.tensor.shape != b.tensor.shape:
        return False
    return all(_has_same_bytes(x, y) or not _unequal(x, y).any() for x, y in _blocks(a, b))


def _has_same_bytes(x: Tensor, y: Tensor) -> bool:
    """Compare bytes, in one thread: torch's threads wait for one another on busy cores."""
    if not (x.is_contiguous() and y.is_contiguous()):
        return False
    return ctypes.string_at(x.data_ptr(), x.nbytes) == ctypes.string_at(y.data_ptr(), y.nbytes)


def _distance(places: Iterable[tuple[TensorSlice, TensorSlice]]) -> tuple[float, float, int]:
    """(largest absolute difference, |a - b| / |a|, number of values that differ)."""
    largest, squares, size, n_different = 0.0, 0.0, 0.0, 0
    for mine, yours in places:
        for a, b in _blocks(mine, yours):
            unequal = _unequal(a, b)
            x, y = a.double(), b.double()
            distance = (x - y).abs_().masked_fill_(~unequal, 0)
            n_different += int(unequal.sum())
            largest = _larger(largest, distance.max().item())
            squares += distance.square_().sum().item()
            size += x.square_().nansum().item()
    return largest, math.sqrt(squares / size) if size else (math.inf if squares else 0.0), n_different


def _unequal(x: Tensor, y: Tensor) -> Tensor:
    if x.dtype != y.dtype or x.dtype.itemsize == 1:  # float8 has no comparisons
        x, y = x.double(), y.double()
    return (x != y) & ~(x.isnan() & y.isnan())


def _larger(x: float, y: float) -> float:
    return math.nan if math.isnan(x) or math.isnan(y) else max(x, y)


def _blocks(a: TensorSlice, b: TensorSlice) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of both tensors, a million values at a time; pages are released before the next rows."""
    if not a.tensor.numel():
        return
    one, other = torch.atleast_1d(a.tensor, b.tensor)
    rows = max(1, BLOCK_VALUES // one[0].numel())
    for x, y in zip(one.split(rows), other.split(rows), strict=True):
        yield x, y
        for block, part in ((x, a), (y, b)):
            if part.is_mapped:  # releasing the pages of a copy would erase it
                release_rows(block)
