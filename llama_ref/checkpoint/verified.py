"""Weights that were never checked are not loaded: each file is compared with checklist.chk once, and that is remembered.

A stamp in the user's cache directory says that a file with this path, size, time and inode had the listed sum. As long as all
of these stay, the next start costs nothing; a file that changed is hashed again. Hashing runs beside loading, in threads.
"""

import contextlib
import hashlib
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llama_ref.checkpoint.checklist import Entry, read_checklist
from llama_ref.checkpoint.folder import CheckpointFolder
from llama_ref.checkpoint.hashing import Cancelled, default_jobs, hash_file
from llama_ref.errors import CheckpointError, RequestError

if sys.platform != "win32":
    import fcntl

Verify = Literal["auto", "always", "never"]

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def verified(folder: CheckpointFolder, verify: Verify = "auto", tokenizer: str | Path | None = None) -> Iterator[None]:
    """Check the files that are about to be used while the block loads them; it ends well only if all of them are whole.

    "auto" checks files that no stamp vouches for, where there is a checklist (else one line says that there is none); "always"
    hashes them whatever the stamps say; "never" does nothing. `tokenizer` is checked if it lies in the folder. Raises
    CheckpointError for a file that is not what the list says, or that it does not name.
    """
    if verify not in ("auto", "always", "never"):
        raise RequestError(f"verify is {verify!r}, expected auto, always or never")
    if verify == "never":
        yield
        return
    wanted = _wanted(folder, tokenizer, verify)
    unknown = wanted if verify == "always" else [file for file in wanted if not file.is_stamped()]
    cancel = threading.Event()
    with ThreadPoolExecutor(default_jobs(), thread_name_prefix="verify") as pool:
        checks: list[Future[None]] = [pool.submit(file.check, verify == "always", cancel) for file in unknown]
        try:
            yield
            for check in checks:
                check.result()
        except BaseException:
            cancel.set()
            raise


def _wanted(folder: CheckpointFolder, tokenizer: str | Path | None, verify: Verify) -> list["_File"]:
    if folder.checklist is None:
        message = f"{folder.path} has no checklist.chk, so nothing says whether its files are whole"
        if verify == "always":
            raise CheckpointError(f"{message}; fetch it, write one with `llama-ref checksum`, or load with verify=auto")
        logger.warning("%s", message)
        return []
    entries = {entry.name: entry for entry in read_checklist(folder.checklist).entries}
    needed = [folder.params, *folder.shards]
    if tokenizer is not None and Path(tokenizer).parent.resolve() == folder.path.resolve():
        needed.append(Path(tokenizer))
    foreign = [path.name for path in needed if path.name not in entries]
    if foreign:
        raise CheckpointError(
            f"{folder.checklist} does not name {', '.join(foreign)}, so they cannot be checked; fetch the release's full list, "
            "move what is not part of it away, or load with verify=never"
        )
    return [_File(path, entries[path.name]) for path in needed]


@dataclass(frozen=True)
class _File:
    path: Path
    entry: Entry

    def is_stamped(self) -> bool:
        """Whether this file, as it is now, was found whole before."""
        try:
            return json.loads(self._stamp_path().read_bytes()) == self._stamp()
        except (OSError, ValueError):
            return False

    def check(self, always: bool, cancel: threading.Event) -> None:
        """Hash the file and stamp it. Raises CheckpointError if it is not what the list says.

        Of several processes that want the same file, one hashes and the others wait for its stamp.
        """
        with self._lock():
            if not always and self.is_stamped():
                return
            before = self._stamp()
            try:
                found = hash_file(self.path, self.entry.algorithm, cancel=cancel)
            except Cancelled:
                return
            except OSError as error:
                raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error
            if found != self.entry.sum:
                raise CheckpointError(
                    f"{self.path} is not what checklist.chk says: {self.entry.algorithm} {found}, expected {self.entry.sum}. "
                    f"Nothing was loaded; `llama-ref verify {self.path.parent}` tells what is wrong with it"
                )
            if self._stamp() != before:
                raise CheckpointError(f"{self.path} changed while it was being checked; try again when it has come to rest")
            self._write_stamp(before)

    def _stamp(self) -> dict[str, int | str]:
        status = self.path.stat()
        return {
            "path": str(self.path.resolve()),
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "inode": status.st_ino,
            "sum": self.entry.sum,
        }

    def _stamp_path(self) -> Path:
        key = hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()
        return cache_directory() / "verified" / f"{key[:32]}.json"

    def _write_stamp(self, stamp: dict[str, int | str]) -> None:
        """Remember; where the cache cannot be written, the file is only hashed again next time."""
        path = self._stamp_path()
        partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps(stamp))
            partial.replace(path)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if sys.platform != "win32":
                with contextlib.suppress(OSError):  # an unwritable cache: every process hashes for itself
                    path = self._stamp_path().with_suffix(".lock")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    fcntl.flock(stack.enter_context(path.open("w")), fcntl.LOCK_EX)
            yield


def cache_directory() -> Path:
    """Where this package may keep what it can do without: llama_ref in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama_ref"
