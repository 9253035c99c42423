"""Read safetensors files: the header, checked against the file's length, and memory-mapped tensors.

The safetensors library opens only complete files. `verify` must describe damaged and truncated
ones: where each tensor is, how long the file should be, and what is wrong with a hostile header.
Loading then needs no second reader.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from llama_ref.checkpoint.formats.pth_pickle import MOST_DIMENSIONS, TEXT_LIMIT_BYTES
from llama_ref.checkpoint.mapped_file import map_file
from llama_ref.checkpoint.shapes import is_ignored
from llama_ref.errors import CheckpointError
from llama_ref.files import check_head_of, opened, unique_keys

if TYPE_CHECKING:
    from torch import Tensor

LENGTH_BYTES = 8  # size of the length field before the header
HEADER_LIMIT_BYTES = 10 << 20  # the largest Llama 3 has about 100 kB
REFETCH = "; fetch it again"
LARGEST = 1 << 60  # bytes or elements, so that sums and products stay within 64 bits
LONGEST_INT = 20  # digits of a 64-bit integer
METADATA = "__metadata__"

DTYPES = {  # name in the file: torch's name, bits per element
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F4": ("float4_e2m1fn_x2", 4),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
    "F64": ("float64", 64),
    "C64": ("complex64", 64),
}


@dataclass(frozen=True)
class HeldTensor:
    """One tensor of a safetensors file; `dtype` is torch's name, `file_offset` its first byte."""

    dtype: str
    shape: tuple[int, ...]
    file_offset: int
    nbytes: int


class WrongLength(CheckpointError):
    """The file is shorter or longer than its header says.

    `expected_size` is in bytes, None if the header itself is truncated.
    """

    def __init__(self, message: str, expected_size: int | None = None):
        super().__init__(message + REFETCH)
        self.expected_size = expected_size


def inspect_safetensors(path: Path) -> dict[str, HeldTensor]:
    """The tensors of a safetensors file by name, checked to fill it without gaps or overlaps.

    At least as strict as the safetensors library: files accepted here open there. Raises
    WrongLength for a truncated or overlong file, CheckpointError for any other damage.
    """
    with opened(path) as file:
        return _inspect(file)[0]


def read_metadata(path: Path) -> dict[str, str]:
    """The file's metadata, {} if it has none. Raises the errors of `inspect_safetensors`."""
    with opened(path) as file:
        return _inspect(file)[1]


def _inspect(file: BinaryIO) -> tuple[dict[str, HeldTensor], dict[str, str]]:
    path = Path(file.name)
    check_head_of(file, "a safetensors file")
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    data = file.read(min(length, HEADER_LIMIT_BYTES))
    _check_length(path, size, length, data)
    header, metadata = _parse(path, data)
    tensors = _tensors(path, header, LENGTH_BYTES + length)
    expected = max((held.file_offset + held.nbytes for held in tensors.values()), default=LENGTH_BYTES + length)
    if expected != size:
        raise WrongLength(f"{path} has {size:,} bytes, but its header describes {expected:,}", expected)
    return tensors, metadata


def map_safetensors(path: Path) -> "dict[str, Tensor]":
    """The file's tensors by name, memory-mapped. Raises the errors of `inspect_safetensors`.

    The library does not guarantee memory-mapping, and only mapped pages can be released again.
    """
    import torch  # slow, and `verify` needs only the headers

    with opened(path) as file:
        tensors, _ = _inspect(file)
        data = torch.frombuffer(map_file(file), dtype=torch.uint8)
    return {name: _map_tensor(path, name, data, held) for name, held in tensors.items() if not is_ignored(name)}


def _map_tensor(path: Path, name: str, data: "Tensor", held: HeldTensor) -> "Tensor":
    import torch

    dtype = getattr(torch, held.dtype, None)  # older torch versions lack the newest dtypes
    if dtype is None or math.prod(held.shape) * dtype.itemsize != held.nbytes:  # packed dtypes
        raise CheckpointError(f"{path}: {name} is {held.dtype}, which is not supported; fetch weights in bfloat16")
    if not held.nbytes:
        return torch.empty(held.shape, dtype=dtype, device="cpu")
    flat = data[held.file_offset : held.file_offset + held.nbytes]
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()  # misaligned by a header of odd length, which no current writer makes
    return flat.view(dtype).view(held.shape)


def _check_length(path: Path, size: int, length: int, data: bytes) -> None:
    if size < LENGTH_BYTES:
        raise WrongLength(f"{path} ends within its first {LENGTH_BYTES} bytes")
    if length > HEADER_LIMIT_BYTES or not b"{".startswith(data[:1]):
        fault = f"does not begin as a safetensors file: its header would have {length:,} bytes"
        raise CheckpointError(f"{path} {fault}{REFETCH}")
    if len(data) < length:
        raise WrongLength(f"{path} ends within its header, which has {length:,} bytes")


def _parse(path: Path, data: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The header's entries, and its metadata."""
    try:
        header = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique_utf8_keys, parse_int=_short_int, parse_constant=_reject_constant
        )
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, f"its {METADATA} is not an object of strings")
    return header, metadata


def _tensors(path: Path, header: dict[str, Any], data_begins: int) -> dict[str, HeldTensor]:
    """All entries as tensors. By offset, each must begin where the one before it ends."""
    spans = {name: _span(path, name, entry) for name, entry in header.items()}
    at, tensors = 0, {}
    for name in sorted(spans, key=lambda name: spans[name]):
        (begin, end), entry = spans[name], header[name]
        if begin != at:
            fault = "overlaps the tensor before it" if begin < at else "leaves a gap after the tensor before it"
            raise _damaged(path, f"{name} {fault} (it begins at {begin:,}, expected {at:,})")
        tensors[name] = HeldTensor(DTYPES[entry["dtype"]][0], tuple(entry["shape"]), data_begins + begin, end - begin)
        at = end
    return {name: tensors[name] for name in header}


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where the tensor's bytes begin and end, relative to the end of the header."""
    if len(name) > TEXT_LIMIT_BYTES:
        raise _damaged(path, f"a tensor's name has {len(name):,} characters, expected {TEXT_LIMIT_BYTES:,} or fewer")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{name} lacks dtype, shape or data_offsets, or has other keys")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _damaged(path, f"{name} has the unknown dtype {dtype!r:.40}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise _damaged(path, f"{name} has a shape or data_offsets that are not whole numbers")
    if len(shape) > MOST_DIMENSIONS:  # before their product, which could have millions of digits
        raise _damaged(path, f"{name} has {len(shape):,} dimensions, expected {MOST_DIMENSIONS} or fewer")
    n_bits = math.prod(shape) * DTYPES[dtype][1]
    begin, end = offsets
    if (end - begin) * 8 != n_bits or math.prod(size for size in shape if size) >= LARGEST:
        raise _damaged(path, f"{name} is {dtype} {tuple(shape)}, {n_bits // 8:,} bytes, but has {end - begin:,}")
    return begin, end


def _are_counts(numbers: Any) -> bool:
    """Whether `numbers` is a list of non-negative integers below LARGEST."""
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < LARGEST for n in numbers)


def _unique_utf8_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = unique_keys(pairs)
    for name in found:
        name.encode()  # UnicodeEncodeError, a ValueError, for a lone surrogate
    return found


def _short_int(digits: str) -> int:
    if len(digits) > LONGEST_INT:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _damaged(path: Path, fault: str) -> CheckpointError:
    return CheckpointError(f"{path} has a damaged header: {fault}{REFETCH}")
