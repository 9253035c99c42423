"""List the tensors of a `.pth` and their file offsets without reading weights or running code."""

import math
import os
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llama_ref.checkpoint.formats.pth_pickle import (
    ITEM_BYTES,
    PICKLE_LIMIT_BYTES,
    PickledTensor,
    RefusedPickle,
    read_tensor_pickle,
)
from llama_ref.checkpoint.formats.pth_zip import BadArchive, Record, read_at, read_directory
from llama_ref.errors import CheckpointError
from llama_ref.files import check_head_of, opened


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a `.pth`, checked to lie within its storage and within the file.

    `dtype` is torch's name ("bfloat16"). `storage_offset` and `stride` count elements.
    `data_offset` is the file offset of its storage. Tensors with the same `storage_key` share
    memory (tied output).
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_key: str
    storage_offset: int
    storage_nbytes: int
    data_offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]

    @property
    def file_offset(self) -> int:
        """Offset of the tensor's first element in the file."""
        return self.data_offset + self.storage_offset * ITEM_BYTES[self.dtype]

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements are stored in row-major order without gaps."""
        in_order = (math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        steps = zip(self.shape, self.stride, in_order, strict=True)
        return 0 in self.shape or all(size == 1 or step == expected for size, step, expected in steps)


def inspect_pth(path: str | Path) -> dict[str, TensorInfo]:
    """The tensors of a `.pth` by name, checked against its zip archive.

    Reads a few megabytes at most, whatever the file's size. Raises CheckpointError if the file is
    something else, the archive is damaged, or its pickle asks for more than tensors.
    """
    with opened(Path(path)) as file:
        return inspect_open_pth(file)


def inspect_open_pth(file: BinaryIO) -> dict[str, TensorInfo]:
    """The tensors of an open `.pth`, as `inspect_pth` reads them. Raises its errors, and OSError."""
    head = check_head_of(file, "a .pth of weights")
    if not head.startswith(b"PK"):
        raise CheckpointError(f"{file.name} {_not_zip(head)}")
    try:
        return _inspect(file)
    except (BadArchive, RefusedPickle) as error:
        raise type(error)(f"{file.name} cannot be used: {error}") from None


def archive_records(path: str | Path) -> list[Record]:
    """All records of a `.pth`'s zip archive in the order of their offsets. Raises BadArchive."""
    with Path(path).open("rb", buffering=0) as file:
        return read_directory(file, os.fstat(file.fileno()).st_size)


def _not_zip(head: bytes) -> str:
    if head[8:9] == b"{":
        return "is a safetensors file under another name; convert it, or fetch the .pth"
    if head.startswith(b"\x80"):
        return "is a bare pickle or in torch's format before 1.6, which is not supported; save it again with a current torch"
    return "is not a .pth written by torch.save (it does not begin with PK); fetch it again"


def _inspect(file: BinaryIO) -> dict[str, TensorInfo]:
    records = {record.name: record for record in read_directory(file, os.fstat(file.fileno()).st_size)}
    root = _root(records)
    data = _small_record(file, records[f"{root}data.pkl"])
    if f"{root}byteorder" in records and _small_record(file, records[f"{root}byteorder"]) != b"little":
        raise BadArchive("its numbers are stored big-endian; save it on a little-endian machine")
    tensors, _ = read_tensor_pickle(data)
    return {name: _tensor_info(name, tensor, records, root) for name, tensor in tensors.items()}


def _root(names: Collection[str]) -> str:
    """The folder that holds all records, as in every file of `torch.save`.

    In other archives `torch.load` might find other records than this reader: it ignores case, and
    looks in the folder of the first record.
    """
    pickles = [name for name in names if name.lower().endswith("/data.pkl")]
    if len(pickles) != 1:
        raise BadArchive(
            f"the archive has {len(pickles)} records named data.pkl, expected one; it may be a zip of something else"
        )
    root = pickles[0].partition("/")[0] + "/"
    spelled = {name.lower(): name for name in (f"{root}data.pkl", f"{root}byteorder")}
    odd = [name for name in names if not name.startswith(root) or spelled.get(name.lower(), name) != name]
    if odd or pickles[0] != f"{root}data.pkl":
        raise BadArchive(f"its record {(odd or pickles)[0]!r} is not where torch.save would put it")
    return root


def _small_record(file: BinaryIO, record: Record) -> bytes:
    if record.size > PICKLE_LIMIT_BYTES:
        raise BadArchive(
            f"its record {record.name!r} claims {record.size:,} bytes, far more than a dictionary of tensors needs"
        )
    data = read_at(file, record.data_offset, record.size)
    if record.crc and zlib.crc32(data) != record.crc:
        raise BadArchive(f"its record {record.name!r} does not match the archive's own CRC-32: the file is damaged")
    return data


def _tensor_info(name: str, tensor: PickledTensor, records: dict[str, Record], root: str) -> TensorInfo:
    storage = tensor.storage
    record = records.get(f"{root}data/{storage.key}")
    if record is None:
        raise BadArchive(f"its tensor {name!r} refers to storage {storage.key!r}, which is missing from the archive")
    if record.size != storage.nbytes:
        raise BadArchive(
            f"its tensor {name!r} claims a storage of {storage.nbytes:,} bytes, but the archive has {record.size:,}"
        )
    available = storage.nbytes // ITEM_BYTES[tensor.dtype]
    numel = math.prod(tensor.shape)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
    if numel and (last >= available or numel > available):
        raise BadArchive(
            f"its tensor {name!r} of shape {tensor.shape}, stride {tensor.stride} and offset {tensor.offset} "
            f"reads past its storage of {available:,} elements"
        )
    if storage.dtype not in (None, tensor.dtype):
        raise BadArchive(f"its tensor {name!r} is {tensor.dtype}, but its storage is {storage.dtype}")
    return TensorInfo(tensor.dtype, tensor.shape, tensor.stride, storage.key, tensor.offset, storage.nbytes, record.data_offset)
