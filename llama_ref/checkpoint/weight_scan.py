"""Reads every weight of a `.pth` once, in constant memory: does it match the archive's own CRC-32, and is it finite?"""

import mmap
import threading
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llama_ref.checkpoint.hashing import Cancelled, Progress
from llama_ref.checkpoint.inspect_pth import TensorInfo, archive_records
from llama_ref.checkpoint.zip_directory import Record

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
    progress: Progress | None = None,
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


def _scan_record(file, view: memoryview, record: Record, dtype: str | None, scan: WeightScan) -> Counter:
    crc, left, counts = 0, record.size, Counter()
    file.seek(record.data_offset)
    while left:
        filled = _fill(file, view[: min(left, CHUNK_BYTES)])
        if not filled:
            raise OSError(f"{record.name} breaks off while being read")
        crc, left = zlib.crc32(view[:filled], crc), left - filled
        if dtype:
            counts += _not_finite(view[:filled], dtype)
    if record.crc and crc != record.crc:
        scan.wrong_crc.append(record.name)
    return counts


def _fill(file, view: memoryview) -> int:
    filled = 0
    while filled < len(view) and (count := file.readinto(view[filled:])):
        filled += count
    return filled


def _not_finite(data: memoryview, dtype: str) -> Counter:
    values = torch.frombuffer(data, dtype=getattr(torch, dtype))
    if not values.is_floating_point():
        return Counter()
    if values.element_size() == 1:
        values = values.float()  # float8 has no comparisons
    if torch.isfinite(values).all():
        return Counter()
    return Counter(nan=int(values.isnan().sum()), inf=int(values.isinf().sum()))
