"""Let one process hash a file while the others wait, for as long as it makes progress.

The process that holds the lock writes its id and name into the lock file, and updates the file's
time while it hashes (a heartbeat). A waiting process logs the owner, and stops waiting if the
heartbeats end: a stopped process (Ctrl-Z, SIGSTOP, a debugger) keeps its lock.
"""

import contextlib
import fcntl
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from llama_ref.formatting import printable

TRY_SECONDS = 0.02  # between two tries for the lock
SILENT_SECONDS = 1.0  # of waiting before the owner is logged
STALLED_SECONDS = 10.0  # without a heartbeat, after which others stop waiting
BEAT_SECONDS = 1.0
OWNER_LIMIT_BYTES = 100  # a process id and a name
NO_LINK = os.O_NOFOLLOW | os.O_NONBLOCK  # follow no link, wait for no pipe

logger = logging.getLogger(__name__)

Beat = Callable[[], None]


@contextlib.contextmanager
def hash_lock(lock: Path | None, hashed: Path, cancel: threading.Event) -> Iterator[Beat]:
    """Wait while another process hashes the file `hashed`; yield a heartbeat for the block to call.

    Continues without a lock if its file `lock` is None or cannot be used, if the lock's owner makes
    no progress, or once `cancel` is set.
    """
    with contextlib.ExitStack() as stack:
        heartbeat = None
        if lock is not None:
            with contextlib.suppress(OSError):
                descriptor = _open(lock)
                stack.callback(os.close, descriptor)
                if _acquire(descriptor, hashed, cancel):
                    _write_owner(descriptor)
                    heartbeat = _Heartbeat(descriptor)
        yield heartbeat.beat if heartbeat else lambda: None


class _Heartbeat:
    """Updates the time of a lock file, at most once in BEAT_SECONDS."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.last = time.monotonic()

    def beat(self) -> None:
        now = time.monotonic()
        if now - self.last >= BEAT_SECONDS:
            self.last = now
            with contextlib.suppress(OSError):
                os.utime(self.descriptor)


def _open(lock: Path) -> int:
    """Open or create a lock file. Raises OSError if others can write to it."""
    lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | NO_LINK, 0o600)
    status = os.fstat(descriptor)
    is_own = status.st_uid == os.geteuid() and not status.st_mode & 0o022
    # We write into it, so it must not be a hard link to another file.
    if not is_own or not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise PermissionError(f"{lock} does not belong to this user alone")
    return descriptor


def _acquire(descriptor: int, hashed: Path, cancel: threading.Event) -> bool:
    """Wait for the lock; False if its owner makes no progress or `cancel` is set."""
    begun = beat_at = time.monotonic()
    beat, has_warned = _last_beat(descriptor), False
    while not _try_lock(descriptor):
        if cancel.wait(TRY_SECONDS):
            return False
        now = time.monotonic()
        if (latest := _last_beat(descriptor)) != beat:
            beat, beat_at = latest, now
        if now - beat_at > STALLED_SECONDS:
            logger.warning(
                "%s has made no progress for %.0f seconds in hashing %s; is it stopped? Hashing the file again",
                _owner(descriptor),
                STALLED_SECONDS,
                printable(str(hashed)),
            )
            return False
        if not has_warned and now - begun > SILENT_SECONDS:
            has_warned = True
            logger.warning("waiting for %s, which is hashing %s", _owner(descriptor), printable(str(hashed)))
    return True


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _last_beat(descriptor: int) -> int:
    return os.fstat(descriptor).st_mtime_ns


def _write_owner(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # such as a full disk: the lock works without it
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {_own_name()}".encode(), 0)
        os.utime(descriptor)


def _own_name() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/self/comm").read_text(errors="replace").strip()
    return "python"


def _owner(descriptor: int) -> str:
    """The lock's owner, from its file: "process 1234 (python)"."""
    with contextlib.suppress(OSError):
        number, _, name = os.pread(descriptor, OWNER_LIMIT_BYTES, 0).decode("utf-8", "replace").partition(" ")
        if number.isascii() and number.isdigit():
            return f"process {number}" + (f" ({printable(name)})" if name else "")
    return "another process"
