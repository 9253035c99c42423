"""Replace a folder with a new one, so that a complete one exists at any moment."""

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

AT_FDCWD = -100  # Linux's fcntl.h: paths are relative to the working directory
SWAP = 2  # RENAME_EXCHANGE of Linux's renameat2, RENAME_SWAP of macOS's renamex_np
UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}


def replace_folder(new: Path, path: Path, aside: Path) -> None:
    """Make `new` the folder at `path`; a previous one ends up at `new` or `aside`.

    The two are exchanged in one step if the system can. Otherwise the old folder is renamed to
    `aside` first, and back if the second step fails or is interrupted. Raises OSError.
    """
    if not path.exists():
        new.rename(path)
        return
    try:
        exchange(new, path)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        try:
            path.rename(aside)
            new.rename(path)
        except BaseException:
            if aside.exists() and not path.exists():
                aside.rename(path)
            raise


def exchange(a: Path, b: Path) -> None:
    """Swap two paths of one file system atomically. Raises OSError (ENOSYS: no such call)."""
    swap = _swap()
    if swap is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if swap(os.fsencode(a), os.fsencode(b)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(a), None, str(b))


def sync_folder(folder: Path) -> None:
    """Write a folder's files and its own entries to the disk."""
    for entry in folder.iterdir():
        if entry.is_file() and not entry.is_symlink():
            _sync(entry)
    sync_entries(folder)


def sync_entries(folder: Path) -> None:
    """Write a folder's entries to the disk, if it may be opened."""
    with suppress(PermissionError):
        _sync(folder)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@cache
def _swap() -> Callable[[bytes, bytes], int] | None:
    library = ctypes.CDLL(None, use_errno=True)
    try:
        if sys.platform == "darwin":
            renamex = library.renamex_np
            return lambda a, b: renamex(a, b, ctypes.c_uint(SWAP))
        renameat2 = library.renameat2
        return lambda a, b: renameat2(AT_FDCWD, a, AT_FDCWD, b, ctypes.c_uint(SWAP))
    except AttributeError:  # a C library without it
        return None
