"""Memory-map files, even files larger than memory; changes stay in this process."""

import mmap
import platform
import sys
from typing import BinaryIO

from llama_ref.errors import CheckpointError

# mmap has the name since Python 3.13; other processors have other numbers.
MAP_NORESERVE = 0x4000 if platform.machine() in ("x86_64", "aarch64") else 0


def map_file(file: BinaryIO) -> mmap.mmap:
    """Map an open file's bytes copy-on-write; nothing is read yet, and the file may be closed.

    Linux refuses a writable mapping larger than memory, except with MAP_NORESERVE. torch's own
    mapping lacks it, and could not map the 16 GB file of an 8B on a machine with 12 GB. Raises
    CheckpointError.
    """
    try:
        if sys.platform != "linux":
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        flags, protection = mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=protection)
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        raise CheckpointError(f"{file.name} cannot be mapped ({error})") from error
