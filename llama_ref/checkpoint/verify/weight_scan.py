"""Reads every weight once, in constant memory: does it match the sums that its file has of its own, and is it finite?"""

import mmap
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import torch

from llama_ref.checkpoint.formats.pth import TensorInfo, archive_records
from llama_ref.checkpoint.formats.pth_zip import Record
from llama_ref.checkpoint.formats.safetensors import HeldTensor
from llama_ref.checkpoint.verify.hashing import Cancelled
from llama_ref.progress import FileProgress

WITHOUT_SPECIALS = ("float4_e2m1fn_x2",)  # neither NaN nor infinity can be written so
CHUNK_BYTES = 4 << 20  # a multiple of every dtype's size


@dataclass
class WeightScan:
    """Names of the records whose CRC-32 is wrong, and counts of NaN and infinite values by tensor."""

    wrong_crc: list[str] = field(default_factory=list)
    not_finite: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> (NaN, ±inf)


def scan_weights(
    path: Path,
    tensors: dict[str, TensorInfo],
    *,
    values: bool,
    progress: FileProgress | None = None,
    cancel: threading.Event | None = None,
) -> WeightScan:
    """Check all records of a `.pth` that `inspect_pth` has passed; with `values` also look for NaN and infinity.

    A value outside every tensor but inside its storage counts towards the tensors on that storage. Raises OSError, or
    Cancelled when `cancel` is set.
    """
    scan = WeightScan()
    of_storage: dict[int, list[tuple[str, str]]] = {}  # data offset -> (name, dtype)
    for name, info in tensors.items():
        of_storage.setdefault(info.data_offset, []).append((name, info.dtype))
    total, done = path.stat().st_size, 0
    with path.open("rb", buffering=0) as file, mmap.mmap(-1, CHUNK_BYTES) as buffer, memoryview(buffer) as view:
        for record in archive_records(path):
            named = of_storage.get(record.data_offset, [])
            if cancel is not None and cancel.is_set():
                raise Cancelled(str(path))
            counts = _scan_record(file, view, record, named[0][1] if values and named else None, scan)
            if sum(counts.values()):
                scan.not_finite |= {name: (counts["nan"], counts["inf"]) for name, _ in named}
            done += record.size
            if progress:
                progress(path, done, total)
    if progress:
        progress(path, total, total)
    return scan


def scan_safetensors(
    path: Path,
    tensors: dict[str, HeldTensor],
    *,
    progress: FileProgress | None = None,
    cancel: threading.Event | None = None,
) -> WeightScan:
    """Look for NaN and infinity in a safetensors file that `inspect_safetensors` has passed; it holds no sums to check.

    Raises OSError, or Cancelled when `cancel` is set.
    """
    scan = WeightScan()
    total, done = path.stat().st_size, 0
    with path.open("rb", buffering=0) as file, mmap.mmap(-1, CHUNK_BYTES) as buffer, memoryview(buffer) as view:
        for name, held in tensors.items():
            file.seek(held.file_offset)
            counts: Counter[str] = Counter()
            for filled in _chunks(file, view, held.nbytes, name):
                if cancel is not None and cancel.is_set():
                    raise Cancelled(str(path))
                counts += _not_finite(view[:filled], held.dtype)
                done += filled
                if progress:
                    progress(path, done, total)
            if sum(counts.values()):
                scan.not_finite[name] = counts["nan"], counts["inf"]
    if progress:
        progress(path, total, total)
    return scan


def _scan_record(file: FileIO, view: memoryview, record: Record, dtype: str | None, scan: WeightScan) -> Counter[str]:
    crc = 0
    counts: Counter[str] = Counter()
    file.seek(record.data_offset)
    for filled in _chunks(file, view, record.size, record.name):
        crc = zlib.crc32(view[:filled], crc)
        if dtype:
            counts += _not_finite(view[:filled], dtype)
    if record.crc and crc != record.crc:
        scan.wrong_crc.append(record.name)
    return counts


def _chunks(file: FileIO, view: memoryview, n_bytes: int, name: str) -> Iterator[int]:
    """Fill `view` with the next bytes again and again, until `n_bytes` are read; yield how many it holds each time."""
    while n_bytes:
        filled = _fill(file, view[: min(n_bytes, CHUNK_BYTES)])
        if not filled:
            raise OSError(f"{name} breaks off while being read")
        n_bytes -= filled
        yield filled


def _fill(file: FileIO, view: memoryview) -> int:
    filled = 0
    while filled < len(view) and (count := file.readinto(view[filled:])):
        filled += count
    return filled


def _not_finite(data: memoryview, dtype: str) -> Counter[str]:
    torch_dtype = getattr(torch, dtype, torch.uint8)  # the newest names are not in every torch
    if not torch_dtype.is_floating_point or dtype in WITHOUT_SPECIALS:
        return Counter()
    values = torch.frombuffer(data, dtype=torch_dtype)
    if values.element_size() == 1:
        values = values.float()  # float8 has no comparisons
    if torch.isfinite(values).all():
        return Counter()
    return Counter(nan=int(values.isnan().sum()), inf=int(values.isinf().sum()))
