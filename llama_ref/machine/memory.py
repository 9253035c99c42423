"""Memory of this process: free memory, freed blocks that the C library keeps, and huge pages."""

import contextlib
import ctypes
import math
import mmap
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST_BLOCK = 32 << 20  # the largest M_MMAP_THRESHOLD that glibc accepts
KEPT = 256 << 20

# Reading quantized weights is 7 to 15 % faster from huge pages. Mapped files use them if the file
# system supports them. KV caches must not: they would use all their memory from the first token on.
HUGE_PAGE = 2 << 20  # bytes


def free_bytes(device: torch.device) -> int | None:
    """Memory that a device has left for this process; None if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return None


def give_back_memory() -> None:
    """Make glibc return freed memory to the system; does nothing with other C libraries.

    glibc keeps freed blocks under 32 MB that lie below a live one: without this, it kept 0.7 GB
    after a 1B's matrices were converted to another layout.
    """
    if trim := _of_glibc("malloc_trim"):
        trim(0)


def keep_scratch_memory() -> None:
    """Let glibc keep up to 256 MB of freed memory for reuse from now on; does nothing with other C libraries.

    A prompt's layers need some MB of scratch memory each. By default glibc may return it at once,
    and the system clears it again for the next layer: this takes a tenth of a 1B's prefill in
    bfloat16, and after 32k tokens more time than the attention of a decode step.
    """
    if option := _of_glibc("mallopt"):
        option(M_MMAP_THRESHOLD, LARGEST_BLOCK)
        option(M_TRIM_THRESHOLD, KEPT)


def empty(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """`torch.empty`, but CPU tensors of 2 MB or more get a separate mapping, in huge pages.

    Without huge pages it uses ordinary ones. Freeing the tensor returns its memory to the system.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes < HUGE_PAGE or torch.device(device).type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, -(-n_bytes // HUGE_PAGE) * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)


def contiguous(x: Tensor) -> Tensor:
    """A contiguous copy, allocated by `empty`."""
    return empty(*x.shape, dtype=x.dtype, device=x.device).copy_(x)


@cache
def _of_glibc(name: str) -> Callable[..., int] | None:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return None
