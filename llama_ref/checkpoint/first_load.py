"""Check files against checklist.chk when they are first loaded, and remember the result.

A stamp in the user's cache directory holds the sum of a file with this path, size, times and inode.
While these stay the same, the next load costs nothing; a changed file is hashed again. Hashing runs
in threads while the weights load.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import stat
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llama_ref.checkpoint.folder import CheckpointFolder
from llama_ref.checkpoint.verify.checklist import Entry, read_checklist
from llama_ref.checkpoint.verify.hashing import Cancelled, hash_file
from llama_ref.cores import cpu_count
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.formatting import printable
from llama_ref.vocabulary import ADDED_TOKENS

Verify = Literal["auto", "always", "never"]

LOCK_WAIT_SECONDS = 0.02  # between two tries for a lock that another process holds
STAMP_LIMIT_BYTES = 1 << 16  # a path and a few numbers; anything longer is not a stamp
NO_LINK = os.O_NOFOLLOW | os.O_NONBLOCK  # follow no link, wait for no pipe

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def verified(
    folder: CheckpointFolder, verify: Verify = "auto", tokenizer: str | Path | None = None, also: Iterable[Path] = ()
) -> Iterator[None]:
    """Check a folder's files while the block loads them; the exit raises if one is damaged.

    "auto" checks files without a valid stamp, or warns that there is no checklist; "always" hashes
    all files; "never" does nothing. `tokenizer` is checked if it is in the folder. `also` are files
    that only "always" requires to be in the list; the others are checked if they are. Raises
    CheckpointError for a file that differs from the list, is not named in it, or changes while it
    is loaded.
    """
    if verify not in ("auto", "always", "never"):
        raise RequestError(f"verify is {verify!r}, expected auto, always or never")
    if verify == "never":
        yield
        return
    started_ns = time.time_ns()
    files = _files_to_check(folder, tokenizer, also, verify)
    cancel = threading.Event()
    with ThreadPoolExecutor(cpu_count(), thread_name_prefix="verify") as pool:
        try:
            checks: list[Future[None]] = [pool.submit(file.check, verify, started_ns, cancel) for file in files]
            for params in checks[:1]:
                params.result()  # before anything is loaded by it
            yield
            for check in as_completed(checks):
                check.result()
            for file in files:
                file.check_unchanged()  # what was loaded is what was hashed
        except BaseException:
            cancel.set()
            raise


def _files_to_check(
    folder: CheckpointFolder, tokenizer: str | Path | None, also: Iterable[Path], verify: Verify
) -> list["_File"]:
    if folder.checklist is None:
        message = f"{folder.path} has no checklist.chk, so nothing says whether its files are whole"
        if verify == "always":
            raise CheckpointError(f"{message}; fetch it, write one with `llama-ref checksum`, or load with verify=auto")
        logger.warning("%s", printable(message))
        return []
    entries = {entry.name: entry for entry in read_checklist(folder.checklist).entries}
    needed = [folder.params, *folder.shards]
    if tokenizer is not None and Path(tokenizer).parent.resolve() == folder.path.resolve():
        needed.append(Path(tokenizer))
        added = Path(tokenizer).with_name(ADDED_TOKENS)
        if Path(tokenizer).suffix != ".json" and os.path.lexists(added):  # it is read too
            needed.append(added)
    needed += [path for path in also if path not in needed and (verify == "always" or path.name in entries)]
    unlisted = [path.name for path in needed if path.name not in entries]
    if unlisted:
        raise CheckpointError(
            f"{folder.checklist} does not name {', '.join(unlisted)}, so they cannot be checked; fetch the full list, "
            "move files that are not part of it away, or load with verify=never"
        )
    return [_File(path, entries[path.name]) for path in needed]


@dataclass(frozen=True)
class _File:
    """A file at the start of a load, and its entry in the list.

    Raises CheckpointError if it is not a plain file.
    """

    path: Path
    entry: Entry
    identity: dict[str, int | str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "identity", self._identity())

    def check(self, verify: Verify, started_ns: int, cancel: threading.Event) -> None:
        """Raise CheckpointError if the file differs from the list; hash it unless its sum is known.

        Of several processes, one hashes the file and the others wait for its result.
        """
        found = self._known_sum(verify, started_ns)
        if found is None:
            with self._lock(cancel):
                found = self._known_sum(verify, started_ns) or self._hash(cancel)
        if found not in (None, self.entry.sum):
            raise CheckpointError(
                f"{self.path} is not what checklist.chk says: {self.entry.algorithm} {found}, expected {self.entry.sum}. "
                f"Nothing was loaded; `llama-ref verify {self.path.parent}` says what is wrong with it"
            )

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file has changed since loading began."""
        if self._identity() != self.identity:
            raise CheckpointError(f"{self.path} changed while it was being checked; try again when nothing writes to it")

    def _identity(self) -> dict[str, int | str]:
        try:
            status = self.path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{self.path} is not a plain file (it is a folder, a device or a pipe)")
            path = os.path.realpath(self.path)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error
        # ctime, unlike mtime, cannot be set by programs.
        times = {"mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
        return {"path": path, "size": status.st_size, **times, "inode": status.st_ino, "sum": self.entry.sum}

    def _hash(self, cancel: threading.Event) -> str | None:
        """Hash the file and remember its sum; None if cancelled."""
        if cancel.is_set():
            return None
        try:
            found = hash_file(self.path, self.entry.algorithm, cancel=cancel)
        except Cancelled:
            return None
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error
        self.check_unchanged()
        self._remember(found)
        return found

    def _known_sum(self, verify: Verify, started_ns: int) -> str | None:
        """The sum in the stamp, if it was found since `started_ns`; with "auto", any right sum."""
        try:
            stamp = json.loads(_read_own(self._stamp_path()))
            found, hashed_ns = str(stamp["found"]), int(stamp["hashed_ns"])
            is_of_this_file = stamp["file"] == self.identity
        except Exception:  # a stamp that cannot be read proves nothing
            return None
        is_fresh = started_ns <= hashed_ns <= time.time_ns()
        is_enough = is_fresh or (verify == "auto" and found == self.entry.sum)
        return found if is_of_this_file and is_enough else None

    def _remember(self, found: str) -> None:
        """Write a stamp; if that fails, the file is hashed again next time."""
        stamp = {"file": self.identity, "found": found, "hashed_ns": time.time_ns()}
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            path = self._stamp_path()
            descriptor, partial = tempfile.mkstemp(dir=path.parent)  # with mode 0600
            stack.callback(Path(partial).unlink, missing_ok=True)
            with open(descriptor, "w") as file:  # noqa: PTH123  a descriptor has no path
                json.dump(stamp, file)
            Path(partial).replace(path)

    def _stamp_path(self) -> Path:
        """The file of the stamp. Raises OSError if there is no place for stamps."""
        directory = cache_directory() / "verified"
        if Path(os.path.realpath(directory)).is_relative_to(os.path.realpath(self.path.parent)):
            raise PermissionError(f"{directory} is in a checkpoint's folder, which stays unchanged")
        key = hashlib.sha256(os.fsencode(f"{self.identity['path']}\0{self.entry.sum}")).hexdigest()
        return directory / f"{key[:32]}.json"

    @contextlib.contextmanager
    def _lock(self, cancel: threading.Event) -> Iterator[None]:
        """Lock out other processes, if the cache can be written; stop waiting if cancelled."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                path = self._stamp_path().with_suffix(".lock")
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o600)
                stack.callback(os.close, descriptor)
                while not _try_lock(descriptor) and not cancel.wait(LOCK_WAIT_SECONDS):
                    pass
            yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_own(path: Path) -> bytes:
    """Read a small file that only this user can write. Raises OSError for any other file."""
    with open(os.open(path, os.O_RDONLY | NO_LINK), "rb") as file:  # noqa: PTH123  a descriptor has no path
        status = os.fstat(file.fileno())
        is_own = status.st_uid == os.geteuid() and not status.st_mode & 0o022
        if not is_own or not stat.S_ISREG(status.st_mode):
            raise PermissionError(f"{path} does not belong to this user alone")
        return file.read(STAMP_LIMIT_BYTES)


def cache_directory() -> Path:
    """This package's cache: llama_ref in $XDG_CACHE_HOME or ~/.cache.

    Raises OSError if the home directory is unknown.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():  # the XDG specification ignores relative paths
        return named / "llama_ref"
    try:
        return Path.home() / ".cache" / "llama_ref"
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from error
