"""Read every weight once, in constant memory, and check CRC-32 and finite values."""

import mmap
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from llama_ref.checkpoint.formats.pth import TensorInfo, archive_records
from llama_ref.checkpoint.formats.pth_zip import Record
from llama_ref.checkpoint.formats.safetensors import HeldTensor
from llama_ref.checkpoint.verify.hashing import Cancelled
from llama_ref.progress import FileProgress

WITHOUT_SPECIALS = ("float4_e2m1fn_x2",)  # has no NaN or infinity
CHUNK_BYTES = 4 << 20  # a multiple of every dtype's size


@dataclass
class WeightScan:
    """Records with a wrong CRC-32, and counts of NaN and infinite values by tensor."""

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
    """Check the CRC-32 of a `.pth`'s records; with `values`, count NaN and infinity.

    The file must be one accepted by `inspect_pth`. Values are counted per storage, so one outside
    every tensor counts for all tensors on its storage. Raises OSError, or Cancelled if `cancel` is
    set.
    """
    scan = WeightScan()
    by_storage: dict[int, list[tuple[str, str]]] = {}  # data offset -> (name, dtype)
    for name, info in tensors.items():
        by_storage.setdefault(info.data_offset, []).append((name, info.dtype))
    total, done = path.stat().st_size, 0
    with path.open("rb", buffering=0) as file, mmap.mmap(-1, CHUNK_BYTES) as buffer, memoryview(buffer) as view:
        for record in archive_records(path):
            named = by_storage.get(record.data_offset, [])
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
    """Count NaN and infinity in a safetensors file accepted by `inspect_safetensors`.

    The format has no checksums. Raises OSError, or Cancelled if `cancel` is set.
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
    """Read `n_bytes` into `view` chunk by chunk; yield the size of each chunk."""
    while n_bytes:
        filled = _fill(file, view[: min(n_bytes, CHUNK_BYTES)])
        if not filled:
            raise OSError(f"{name} ended while being read")
        n_bytes -= filled
        yield filled


def _fill(file: FileIO, view: memoryview) -> int:
    filled = 0
    while filled < len(view) and (count := file.readinto(view[filled:])):
        filled += count
    return filled


def _not_finite(data: memoryview, dtype: str) -> Counter[str]:
    import torch  # only now: checksums do not wait for it

    torch_dtype = getattr(torch, dtype, torch.uint8)  # older torch versions lack the newest dtypes
    if not torch_dtype.is_floating_point or dtype in WITHOUT_SPECIALS:
        return Counter()
    values = torch.frombuffer(data, dtype=torch_dtype)
    if values.element_size() == 1:
        values = values.float()  # float8 has no comparisons
    if torch.isfinite(values).all():
        return Counter()
    return Counter(nan=int(values.isnan().sum()), inf=int(values.isinf().sum()))
