"""Open files for reading, and record which file each path led to.

A path may lead to another file at any moment: links are changed, files and folders are renamed.
Only a descriptor stays with its file. So verification compares the identity of the descriptor that
was hashed with that of every descriptor from which data was loaded.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from llama_ref.errors import CheckpointError


@dataclass(frozen=True)
class FileIdentity:
    """Which file a descriptor is open on, and when it was last changed.

    Unlike mtime, ctime cannot be set by programs.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def from_file(cls, file: BinaryIO) -> "FileIdentity":
        status = os.fstat(file.fileno())
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


Opened = dict[Path, set[FileIdentity]]  # by path: the files that were opened under it

_watching: ContextVar[tuple[Opened, ...]] = ContextVar("watching", default=())


def open_file(path: Path) -> FileIO:
    """Open a plain file for reading, unbuffered and without blocking on a pipe.

    Raises OSError, CheckpointError if it is not a plain file, ValueError for a NUL byte in the
    name.
    """
    _check_plain(path, path.stat())  # some devices act when they are opened
    file = FileIO(path, opener=_without_waiting)
    try:
        _check_plain(path, os.fstat(file.fileno()))
        for opened in _watching.get():
            opened.setdefault(path, set()).add(FileIdentity.from_file(file))
    except BaseException:
        file.close()
        raise
    return file


@contextmanager
def watch_opened() -> Iterator[Opened]:
    """Record the files that `open_file` opens in the block, but not in threads started in it."""
    opened: Opened = {}
    token = _watching.set((*_watching.get(), opened))
    try:
        yield opened
    finally:
        _watching.reset(token)


def _check_plain(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a plain file (it is a folder, a device or a pipe)")


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
