"""A lock that allows one download at a time per folder: a second one logs a warning and waits."""

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llama_ref.errors import DownloadError
from llama_ref.formatting import printable

LOCK_NAME = ".download.lock"
TRY_SECONDS = 0.1

logger = logging.getLogger(__name__)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold a folder's download lock for the block, creating the folder if needed.

    Raises DownloadError.
    """
    try:
        descriptor = _locked(folder)
    except OSError as error:
        raise DownloadError(f"cannot write into {folder}: {error.strerror}; allow writing there") from error
    try:
        yield
    finally:
        with suppress(OSError):  # while still locked, so that a waiting process notices the removal (`_is_there`)
            (folder / LOCK_NAME).unlink()
        os.close(descriptor)


def _locked(folder: Path) -> int:
    """The descriptor of the lock file, locked and not removed by its former owner."""
    has_said = False
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(folder / LOCK_NAME, descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        except BlockingIOError:
            if not has_said:
                has_said = True
                logger.warning("waiting for %s, which is downloading into %s", _owner(descriptor), printable(str(folder)))
            time.sleep(TRY_SECONDS)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_there(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False


def _owner(descriptor: int) -> str:
    number = os.pread(descriptor, 20, 0).decode("ascii", "replace")
    return f"process {number}" if number.isdigit() else "another process"
