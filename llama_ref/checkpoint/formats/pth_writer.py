"""Write a `.pth` like `torch.save`, but block by block: tensors may be larger than memory."""

import hashlib
import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from llama_ref.checkpoint.formats.atomic import new_file
from llama_ref.checkpoint.formats.lazy_tensor import BytesWritten, LazyTensor, check_writable
from llama_ref.checkpoint.formats.pth_pickle import ITEM_BYTES, STORAGES
from llama_ref.checkpoint.formats.pth_zip import END, END64, END64_SIGNATURE, LOCAL, LOCATOR64, LOCATOR64_SIGNATURE
from llama_ref.formatting import dtype_name

ALIGNMENT_BYTES = 64  # of every record's data, so that it can be used memory-mapped
PADDING_FIELD = b"FB"  # the extra field that torch pads with
ZIP64_VERSION = 45
ZIP64_FIELD_BYTES = 20  # after the padding, in a large record's header
FORMAT_VERSION = b"3\n"  # torch's version of zip archives without code
RECORD_BYTES = 512  # upper bound for headers, padding and directory entry

STORAGE_OF = {getattr(torch, dtype): getattr(torch, storage) for storage, dtype in STORAGES.items()}


def write_pth(
    path: str | Path,
    tensors: Sequence[LazyTensor],
    aliases: Mapping[str, str] | None = None,
    progress: BytesWritten | None = None,
) -> None:
    """Write the new file `path` atomically, for `torch.load` with or without `mmap`.

    `aliases` ({"output.weight": "tok_embeddings.weight"}) are second names for tensors, sharing
    their storage. The same tensors give the same bytes. Raises CheckpointError if the file cannot
    be written, ValueError if blocks do not match their tensor.
    """
    path = Path(path)
    check_writable(tensors)
    index = _index(tensors, aliases or {})
    with new_file(path, sum(tensor.nbytes + RECORD_BYTES for tensor in tensors) + len(index)) as file:
        archive = _Archive(file, path.stem)
        with archive.zip:
            archive.add("data.pkl", index)
            # Torch 2.7 and later add .format_version here, which lets readers compute the offsets
            # of storages. zipfile lays out zip64 records differently from torch, so we leave it
            # out.
            archive.add("byteorder", sys.byteorder.encode())
            for key, tensor in enumerate(tensors):
                archive.add(f"data/{key}", tensor, progress)
            archive.add("version", FORMAT_VERSION)
            archive.add(".data/serialization_id", archive.contents_id())
            archive.finish()


class _Archive:
    """A zip archive of uncompressed records with aligned data, written in order."""

    def __init__(self, file: BinaryIO, root: str) -> None:
        self.sink = _Unseekable(file)
        # The stubs ask for close(), but zipfile does not close a file that it was given: hence the ignore.
        self.zip = zipfile.ZipFile(self.sink, "w", zipfile.ZIP_STORED)  # type: ignore[call-overload]
        self.root = root if root.isascii() else "archive"  # as torch does

    def add(self, name: str, data: bytes | LazyTensor, progress: BytesWritten | None = None) -> None:
        info = zipfile.ZipInfo(f"{self.root}/{name}")
        is_large = (len(data) if isinstance(data, bytes) else data.nbytes) > zipfile.ZIP64_LIMIT
        info.extra = self._padding(info, is_large)
        with self.zip.open(info, "w", force_zip64=is_large) as record:
            if isinstance(data, bytes):
                record.write(data)
            else:
                data.write_to(record, progress)
        info.extra = b""  # the directory need not repeat the padding

    def finish(self) -> None:
        file, begins = self.sink.file, self.sink.tell()
        self.sink.file = directory = io.BytesIO()
        self.zip.close()
        file.write(_with_zip64_end(directory.getvalue(), begins))

    def contents_id(self) -> bytes:
        """A 40-digit hash of all records so far."""
        records = "".join(f"{info.filename} {info.CRC}\n" for info in self.zip.infolist())
        return b"%040d" % (int(hashlib.sha256(records.encode()).hexdigest(), 16) % 10**40)

    def _padding(self, info: zipfile.ZipInfo, is_large: bool) -> bytes:
        head = LOCAL.size + len(info.filename) + len(PADDING_FIELD) + 2 + (ZIP64_FIELD_BYTES if is_large else 0)
        n_bytes = -(self.sink.tell() + head) % ALIGNMENT_BYTES
        return PADDING_FIELD + n_bytes.to_bytes(2, "little") + b"Z" * n_bytes


def _with_zip64_end(directory: bytes, begins: int) -> bytes:
    """A zip directory at the offset `begins` with a zip64 end record, which torch always writes.

    So the end always has the same length, and the complete size of a truncated file can be
    computed.
    """
    if directory[-END.size - LOCATOR64.size :].startswith(LOCATOR64_SIGNATURE):
        return directory
    entries, end = directory[: -END.size], directory[-END.size :]
    n_records, place = END.unpack(end)[4], (len(entries), begins)
    end64 = END64.pack(END64_SIGNATURE, END64.size - 12, ZIP64_VERSION, ZIP64_VERSION, 0, 0, n_records, n_records, *place)
    return entries + end64 + LOCATOR64.pack(LOCATOR64_SIGNATURE, 0, begins + len(entries), 1) + end


class _Unseekable:
    """A file that cannot seek: zipfile then writes size and CRC-32 after the data, like torch."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.at = file, 0

    def write(self, data: bytes | memoryview) -> int:
        n_bytes = self.file.write(data)
        self.at += n_bytes
        return n_bytes

    def tell(self) -> int:
        return self.at

    def flush(self) -> None:
        self.file.flush()


@dataclass(frozen=True)
class _Storage:
    tensor: LazyTensor
    key: str


class _Entry:
    """A tensor as torch.save pickles it: contiguous, on a storage of its own."""

    def __init__(self, tensor: LazyTensor, key: str) -> None:
        self.tensor, self.key = tensor, key

    def __reduce__(self) -> tuple:
        shape = (*self.tensor.shape,)  # a copy: pickle writes a shared object as a reference
        stride = torch.empty(shape, device="meta").stride()
        storage = _Storage(self.tensor, self.key)
        if self.tensor.dtype in STORAGE_OF:
            return torch._utils._rebuild_tensor_v2, (storage, 0, shape, stride, False, OrderedDict())
        dtype = self.tensor.dtype  # newer than typed storages
        return torch._utils._rebuild_tensor_v3, (storage, 0, shape, stride, False, OrderedDict(), dtype)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> tuple | None:
        if not isinstance(value, _Storage):
            return None
        tensor = value.tensor
        if tensor.dtype in STORAGE_OF:
            return ("storage", STORAGE_OF[tensor.dtype], value.key, "cpu", tensor.numel)
        return ("storage", torch.UntypedStorage, value.key, "cpu", tensor.nbytes)


def _index(tensors: Sequence[LazyTensor], aliases: Mapping[str, str]) -> bytes:
    """The content of data.pkl: the dictionary of tensors without their values."""
    for tensor in tensors:
        if dtype_name(tensor.dtype) not in ITEM_BYTES:
            raise ValueError(f"{tensor.name} is {tensor.dtype}, which a .pth cannot store")
    entries = {tensor.name: _Entry(tensor, str(key)) for key, tensor in enumerate(tensors)}
    for alias, name in aliases.items():
        if alias in entries or name not in entries:
            raise ValueError(f"{alias} cannot be an alias of {name}: {alias} is taken or {name} does not exist")
        entries[alias] = entries[name]  # one object: pickled once, read back as one tensor
    out = io.BytesIO()
    _Pickler(out, protocol=2).dump(entries)
    return out.getvalue()
