"""Memory that is free, but not given back to the system."""

import ctypes
from collections.abc import Callable
from functools import cache


def give_back_memory() -> None:
    """Let the system have what the C library keeps of freed memory; only glibc is asked.

    Of blocks under 32 MB, as most temporary tensors here are, it keeps what lies below a block that lives on: without this,
    turning a 1B's matrices into another layout left 0.7 GB with it.
    """
    if trim := _malloc_trim():
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return None
