"""Check files against checklist.chk when they are first loaded, and remember the result.

A stamp in the user's cache directory records a file's checksum with its path, device, inode, size
and times. While these stay the same, the file is not hashed again. Hashing runs in threads while
the weights load. Both open the file, perhaps at different times; at the end the identities of all
descriptors are compared, which makes sure that the loaded file is the hashed one.
"""

import contextlib
import hashlib
import json
import logging
import os
import stat
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from llama_ref.checkpoint.folder import CheckpointFolder
from llama_ref.checkpoint.loading.hash_lock import NO_LINK, Beat, hash_lock
from llama_ref.checkpoint.size_limits import check_limit
from llama_ref.checkpoint.verify.checklist import Entry, read_checklist
from llama_ref.checkpoint.verify.hashing import Cancelled, hash_open_file
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.formatting import printable
from llama_ref.machine.cores import cpu_count
from llama_ref.machine.waiting import as_they_end, interrupt_held, result_of
from llama_ref.opened_files import FileIdentity, Opened, open_file, watch_opened
from llama_ref.vocabulary import ADDED_TOKENS

Verify = Literal["auto", "always", "never"]

STAMP_LIMIT_BYTES = 1 << 16  # a path and a few numbers; anything longer is not a stamp

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def verified(
    folder: CheckpointFolder,
    verify: Verify = "auto",
    tokenizer: str | Path | None = None,
    also: Iterable[Path] = (),
    opened_before: Opened | None = None,
) -> Iterator[None]:
    """Check a folder's files while the block loads them; the exit raises if one is damaged.

    "auto" checks files without a valid stamp, or warns that there is no checklist; "always" hashes
    all files; "never" does nothing. `tokenizer` is checked if it is in the folder. `also` are more
    files: "always" requires them to be in the list, "auto" checks those that are. Files in
    `opened_before` must be the same files. Raises CheckpointError for a file that differs from the
    list, is not named in it, or changes or is replaced while it is loaded.
    """
    if verify not in ("auto", "always", "never"):
        raise RequestError(f"verify is {verify!r}, expected auto, always or never")
    if verify == "never":
        yield
        return
    started_ns = time.time_ns()
    cancel = threading.Event()
    with contextlib.ExitStack() as stack:
        to_check = _files_to_check(folder, tokenizer, also, verify)
        files = [stack.enter_context(contextlib.closing(_File(path, entry))) for path, entry in to_check]
        for file in files:
            check_limit(file.path, file.identity.size)
        opened = stack.enter_context(watch_opened())
        pool = stack.enter_context(ThreadPoolExecutor(cpu_count(), thread_name_prefix="verify"))
        try:
            with interrupt_held():
                checks: list[Future[None]] = [pool.submit(file.check, verify, started_ns, cancel) for file in files]
                for params in checks[:1]:
                    result_of(params)  # params.json, which decides what is loaded
            yield
            with interrupt_held():
                for check in as_they_end(checks):
                    check.result()
            opened_paths = {*opened, *(opened_before or {})}
            _check_added_tokens(tokenizer, {file.path for file in files}, opened_paths)
            for file in files:
                file.check_unchanged(opened, opened_before or {})
        except BaseException:
            cancel.set()
            raise


def _files_to_check(
    folder: CheckpointFolder, tokenizer: str | Path | None, also: Iterable[Path], verify: Verify
) -> list[tuple[Path, Entry]]:
    """The files that are about to be loaded, params.json first, and their entries in the list."""
    if folder.checklist is None:
        message = f"{folder.path} has no checklist.chk, so its files cannot be verified"
        if verify == "always":
            raise CheckpointError(f"{message}; fetch it, write one with `llama-ref checksum`, or load with verify=auto")
        logger.warning("%s", printable(message))
        return []
    entries = {entry.name: entry for entry in read_checklist(folder.checklist).entries}
    needed = [path for path in (folder.params,) if path.exists()] + [*folder.weights]
    if tokenizer is not None and _is_in(folder, Path(tokenizer)):
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
    return [(path, entries[path.name]) for path in needed]


def _is_in(folder: CheckpointFolder, path: Path) -> bool:
    # By name first: a link's target may change from one `resolve` to the next.
    return path.parent == folder.path or path.parent.resolve() == folder.path.resolve()


def _check_added_tokens(tokenizer: str | Path | None, checked: set[Path], opened: set[Path]) -> None:
    """Raise CheckpointError if added_tokens.json appeared or vanished since the check started."""
    if tokenizer is None or Path(tokenizer).suffix == ".json" or Path(tokenizer) not in checked & opened:
        return
    added = Path(tokenizer).with_name(ADDED_TOKENS)
    if (added in opened) != (added in checked):
        raise CheckpointError(
            f"{added} appeared or vanished while the folder was being checked; try again when nothing changes it"
        )


class _File:
    """A file, open from the start of a load to its end, and its entry in the list.

    Raises CheckpointError if it is not a plain file.
    """

    def __init__(self, path: Path, entry: Entry):
        self.path, self.entry = path, entry
        try:
            self.real_path = os.path.realpath(path)
            self.file = open_file(path)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        self.identity = FileIdentity.from_file(self.file)

    def close(self) -> None:
        self.file.close()

    def check(self, verify: Verify, started_ns: int, cancel: threading.Event) -> None:
        """Raise CheckpointError if the file differs from the list; hash it unless its sum is known.

        If several processes check the file, one hashes it and the others wait for the result.
        """
        found = self._known_sum(verify, started_ns)
        if found is None:
            with hash_lock(self._lock_path(), self.path, cancel) as beat:
                found = self._known_sum(verify, started_ns) or self._hash(cancel, beat)
        if found not in (None, self.entry.sum):
            raise CheckpointError(
                f"{self.path} does not match checklist.chk: {self.entry.algorithm} {found}, expected {self.entry.sum}. "
                f"Nothing was loaded; `llama-ref verify {self.path.parent}` says what is wrong with it"
            )

    def check_unchanged(self, *watched: Opened) -> None:
        """Raise CheckpointError if the file has changed, or another one was opened under its path."""
        opened = {identity for each in watched for identity in each.get(self.path, ())}
        if {FileIdentity.from_file(self.file), *opened} != {self.identity}:
            raise CheckpointError(
                f"{self.path} changed while it was being checked, or a link or folder on its path did; try again when "
                "nothing changes them"
            )

    def _hash(self, cancel: threading.Event, beat: Beat) -> str | None:
        """Hash the file and remember its sum; None if cancelled."""
        if cancel.is_set():
            return None
        try:
            found = hash_open_file(self.file, self.entry.algorithm, lambda *_: beat(), cancel)
        except Cancelled:
            return None
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error
        self.check_unchanged()
        self._remember(found)
        return found

    def _known_sum(self, verify: Verify, started_ns: int) -> str | None:
        """The stamp's checksum if newer than `started_ns` or, with "auto", equal to the list's."""
        try:
            stamp = json.loads(_read_own(self._stamp_path()))
            found, hashed_ns = str(stamp["found"]), int(stamp["hashed_ns"])
            is_of_this_file = stamp["file"] == self._key()
        except Exception:  # a stamp that cannot be read proves nothing
            return None
        is_fresh = started_ns <= hashed_ns <= time.time_ns()
        is_enough = is_fresh or (verify == "auto" and found == self.entry.sum)
        return found if is_of_this_file and is_enough else None

    def _remember(self, found: str) -> None:
        """Write a stamp; if that fails, the file is hashed again next time."""
        stamp = {"file": self._key(), "found": found, "hashed_ns": time.time_ns()}
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            path = self._stamp_path()
            descriptor, partial = tempfile.mkstemp(dir=path.parent)  # with mode 0600
            stack.callback(Path(partial).unlink, missing_ok=True)
            with open(descriptor, "w") as file:  # noqa: PTH123  a descriptor has no path
                json.dump(stamp, file)
            Path(partial).replace(path)

    def _key(self) -> dict[str, int | str]:
        """The file identity and the listed checksum for which a stamp is valid."""
        return {"path": self.real_path, **asdict(self.identity), "sum": self.entry.sum}

    def _stamp_path(self) -> Path:
        """The file of the stamp. Raises OSError if stamps cannot be stored."""
        directory = cache_directory() / "verified"
        if Path(os.path.realpath(directory)).is_relative_to(os.path.realpath(self.path.parent)):
            raise PermissionError(f"{directory} is in a checkpoint's folder, which stays unchanged")
        key = hashlib.sha256(os.fsencode(f"{self.real_path}\0{self.entry.sum}")).hexdigest()
        return directory / f"{key[:32]}.json"

    def _lock_path(self) -> Path | None:
        with contextlib.suppress(OSError):
            return self._stamp_path().with_suffix(".lock")
        return None


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
