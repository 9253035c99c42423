"""Memory that is free, but not given back to the system: to have less of it, or to keep it where it is needed again at once."""

import ctypes
from collections.abc import Callable
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST_BLOCK = 32 << 20  # the most that glibc takes for M_MMAP_THRESHOLD
KEPT = 64 << 20


def give_back_memory() -> None:
    """Let the system have what the C library keeps of freed memory; only glibc is asked.

    Of blocks under 32 MB, as most temporary tensors here are, it keeps what lies below a block that lives on: without this,
    turning a 1B's matrices into another layout left 0.7 GB with it.
    """
    if trim := _of_glibc("malloc_trim"):
        trim(0)


def keep_scratch_memory() -> bool:
    """From now on let glibc keep up to 64 MB of freed memory for what comes next, as it is; whether it does.

    After some thousand tokens a layer's attention needs a few MB for a moment. As glibc is set up it gives these back at
    once, and the system clears them anew for the next layer: after 32k tokens that took longer than the attention.
    """
    option = _of_glibc("mallopt")
    return option is not None and option(M_MMAP_THRESHOLD, LARGEST_BLOCK) == option(M_TRIM_THRESHOLD, KEPT) == 1


@cache
def _of_glibc(name: str) -> Callable[..., int] | None:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return None
