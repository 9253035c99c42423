"""Map files of any size into memory, where what is changed stays in this process."""

import mmap
import platform
import sys
from pathlib import Path

# Python names it from 3.13 on; other processors have other numbers.
MAP_NORESERVE = 0x4000 if platform.machine() in ("x86_64", "aarch64") else 0


def map_file(path: Path) -> mmap.mmap:
    """A file's bytes, mapped copy-on-write; nothing is read yet.

    Linux refuses a mapping that may be written to and is larger than the machine's memory, unless
    told not to reserve memory for it. torch's own mapping does not say so: with 12 GB of memory the
    16 GB file of an 8B could not be mapped. Raises OSError, and ValueError for an empty file.
    """
    with path.open("rb") as file:
        if sys.platform != "linux":
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        flags, protection = mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=protection)
