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
from llama_ref.checkpoint.meta_quantized.kinds import value_range
from llama_ref.checkpoint.verify.hashing import Cancelled
from llama_ref.progress import FileProgress

WITHOUT_SPECIALS = ("float4_e2m1fn_x2",)  # has no NaN or infinity
CHUNK_BYTES = 4 << 20  # a multiple of every dtype's size


@dataclass
class WeightScan:
    """Records with a wrong CRC-32; by tensor, counts of NaN, infinite and out-of-range values.

    Only the values and scales of quantized matrices have a range.
    """

    wrong_crc: list[str] = field(default_factory=list)
    not_finite: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> (NaN, ±inf)
    out_of_range: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, counts: Counter[str]) -> None:
        """Count a tensor's odd values."""
        if counts["nan"] or counts["inf"]:
            self.not_finite[name] = counts["nan"], counts["inf"]
        elif counts["outside"]:
            self.out_of_range[name] = counts["outside"]


def scan_weights(
    path: Path,
    tensors: dict[str, TensorInfo],
    *,
    values: bool,
    progress: FileProgress | None = None,
    cancel: threading.Event | None = None,
) -> WeightScan:
    """Check the CRC-32 of a `.pth`'s records; with `values`, count NaN and infinity.

    `inspect_pth` must accept the file. Values are counted per storage, so a value that is in no
    tensor counts for all tensors on its storage. Raises OSError, or Cancelled if `cancel` is set.
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
            counts = _scan_record(file, view, record, named[0] if values and named else None, scan)
            for name, _ in named:
                scan.add(name, counts)
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
                counts += _odd_values(view[:filled], name, held.dtype)
                done += filled
                if progress:
                    progress(path, done, total)
            scan.add(name, counts)
    if progress:
        progress(path, total, total)
    return scan


def _scan_record(
    file: FileIO, view: memoryview, record: Record, tensor: tuple[str, str] | None, scan: WeightScan
) -> Counter[str]:
    crc = 0
    counts: Counter[str] = Counter()
    file.seek(record.data_offset)
    for filled in _chunks(file, view, record.size, record.name):
        crc = zlib.crc32(view[:filled], crc)
        if tensor:
            counts += _odd_values(view[:filled], *tensor)
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


def _odd_values(data: memoryview, name: str, dtype: str) -> Counter[str]:
    """Counts of NaN, of infinite values and of values outside the tensor's range."""
    import torch  # slow, and not needed for checksums alone

    torch_dtype = getattr(torch, dtype, torch.uint8)  # older torch versions lack the newest dtypes
    allowed = value_range(name, dtype)
    if dtype in WITHOUT_SPECIALS or not (torch_dtype.is_floating_point or allowed):
        return Counter()
    values = torch.frombuffer(data, dtype=torch_dtype)
    if torch_dtype.is_floating_point and values.element_size() == 1:
        values = values.float()  # float8 has no comparisons
    counts: Counter[str] = Counter()
    if torch_dtype.is_floating_point and not torch.isfinite(values).all():
        counts += Counter(nan=int(values.isnan().sum()), inf=int(values.isinf().sum()))
    if allowed:
        counts += Counter(outside=int(((values < allowed[0]) | (values > allowed[1])).sum()))
    return counts
