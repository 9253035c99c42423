"""Write a checkpoint folder or one of its files atomically: the result is complete or absent."""

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from llama_ref.checkpoint.formats.exchange import replace_folder, sync_entries, sync_folder
from llama_ref.checkpoint.verify.checklist import CHECKLIST_NAME, format_entry
from llama_ref.checkpoint.verify.hashing import hash_files
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.formatting import human_bytes
from llama_ref.progress import FileProgress

logger = logging.getLogger(__name__)

CHECKPOINT_FILE = re.compile(
    r"params\.json|tokenizer\.model|checklist\.chk|consolidated\.\d{2,}\.pth|README\.md"
    r"|(generation_)?config\.json|(tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json"
    r"|chat_template\.(jinja|json)|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)
PARTIAL_FILE = re.compile(r"\..+\.[0-9a-f]{32}\.partial")  # of `atomic_file`
LONGEST_STEM = 40  # characters of its name
ABANDONED_SECONDS = 3600.0  # after which a partial file counts as abandoned
ELSEWHERE = "choose another folder"
STARTING = 60  # seconds after which a run that has not locked its folder must have died
ADVICE_WHEN_FULL: dict[int | None, str] = {  # by OSError.errno
    errno.ENOSPC: "free some space there or choose another folder",
    errno.EDQUOT: "your quota there is used up: free some of it or choose another folder",
    errno.EFBIG: "files may not be that large there: raise the limit (ulimit -f) or choose another folder",
}
ADVICE = ADVICE_WHEN_FULL | {errno.EEXIST: "remove it or choose another name"}


@contextmanager
def new_folder(path: str | Path, *, force: bool = False, n_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` if the block succeeds and is deleted if it fails.

    It is created next to `path` under a hidden name, flushed to the disk, and then exchanged with
    the folder at `path`: even if the run is killed, `path` holds a complete checkpoint, old or new.
    The next run for the same `path` deletes the leftovers of killed runs. `n_bytes` is the expected
    size, if known. Raises RequestError if `path` exists, unless `force` is given and it holds only
    checkpoint files. Raises CheckpointError if it cannot be written (disk full, no permission): any
    OSError in the block becomes one.
    """
    path = Path(path).expanduser()
    with _as_checkpoint_error(path, "create"):
        path = path.resolve()
        recover(path)
        _check_target(path, force)
        _check_parent(path)
        check_free_space(path, n_bytes)
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        partial, lock = _make_partial(path)
    try:
        with _as_checkpoint_error(partial, "write"):
            yield partial
            _check_target(path, force)  # another process may have created it
            sync_folder(partial)
            replace_folder(partial, path, partial.with_suffix(".old"))
            sync_entries(path.parent)
    except CheckpointError as error:
        message = str(error).replace(str(partial), str(path))  # hide the temporary name
        raise type(error)(message) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if path.exists():  # else a second Ctrl-C prevented restoring the old folder: the next run does it
            shutil.rmtree(partial.with_suffix(".old"), ignore_errors=True)
        os.close(lock)


@contextmanager
def new_file(path: Path, n_bytes: int) -> Iterator[BinaryIO]:
    """Yield a new file for about `n_bytes`; it is deleted if the block fails.

    Raises CheckpointError if the file exists, does not fit on the disk or cannot be written.
    """
    check_free_space(path, n_bytes)
    with _as_checkpoint_error(path, "write", n_bytes), path.open("xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())  # some file systems report a full disk only here
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def check_free_space(path: str | Path, n_bytes: int) -> None:
    """Raise CheckpointError if `n_bytes` do not fit on the disk where `path` is or will be."""
    path = Path(path)
    with _as_checkpoint_error(path, "write"):
        free = _free_bytes(path)
    if free is not None and n_bytes > free:
        raise CheckpointError(
            f"cannot write {path}: it needs {human_bytes(n_bytes)} and {human_bytes(free)} are free there; "
            f"{ADVICE_WHEN_FULL[errno.ENOSPC]}"
        )


def write_params(folder: Path, params: Mapping[str, Any]) -> None:
    """Write params.json on a single line, as Meta does."""
    (folder / "params.json").write_text(json.dumps(params) + "\n")


def write_sums(
    folder: Path, names: Iterable[str], algorithm: str = "md5", jobs: int | None = None, progress: FileProgress | None = None
) -> Path:
    """Write checklist.chk with the checksums of the named files; return its path.

    Up to `jobs` files are hashed at a time (default: one per core). Raises CheckpointError if a
    file cannot be read or the list cannot be written.
    """
    target, in_order = folder / CHECKLIST_NAME, sorted(names)
    sums = {}
    for path, hashed in hash_files([(folder / name, algorithm) for name in in_order], jobs, progress).items():
        if isinstance(hashed, OSError):
            raise CheckpointError(f"cannot read {path}: {hashed.strerror}; no list was written")
        sums[path] = hashed.sum
    _write_atomically(target, b"".join(format_entry(name, sums[folder / name]) for name in in_order))
    return target


def _write_atomically(target: Path, data: bytes) -> None:
    try:
        with atomic_file(target) as file:
            file.write(data)
    except OSError as error:
        advice = ADVICE_WHEN_FULL.get(error.errno, "allow writing there")
        raise CheckpointError(f"cannot write {target}: {error.strerror}; {advice}") from error


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that replaces `path` if the block succeeds and is deleted if it fails.

    It gets the permissions of the file that it replaces. Files that killed runs left for the same
    path are removed. Raises OSError if it cannot be written.
    """
    _remove_partial_files(path)
    partial_file = path.with_name(f".{path.stem[:LONGEST_STEM]}.{uuid.uuid4().hex}.partial")
    with partial_file.open("xb") as file:
        try:
            with suppress(OSError):  # there is no file to replace
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())  # some file systems report a full disk only here
            partial_file.replace(path)
        finally:
            with suppress(OSError):
                partial_file.unlink(missing_ok=True)


def _remove_partial_files(path: Path) -> None:
    """Remove the partial files that killed runs of `atomic_file` left for this path."""
    with suppress(OSError):
        for entry in path.parent.iterdir():
            is_ours = PARTIAL_FILE.fullmatch(entry.name) and entry.name.startswith(f".{path.stem[:LONGEST_STEM]}.")
            if is_ours and time.time() - entry.stat().st_mtime > ABANDONED_SECONDS:
                entry.unlink(missing_ok=True)


@contextmanager
def _as_checkpoint_error(path: Path, verb: str, n_bytes: int = 0) -> Iterator[None]:
    """Turn an OSError raised in the block into a CheckpointError with advice."""
    try:
        yield
    except ConnectionError:
        raise  # the reader of our output has closed the pipe: not an error about files
    except OSError as error:
        what = error.strerror or error
        if verb == "write" and _is_outside(error.filename, path):  # a source file, not the target
            raise CheckpointError(f"cannot use {error.filename}: {what}; nothing was written") from error
        needed = f"it needs {human_bytes(n_bytes)}; " if n_bytes and error.errno in ADVICE_WHEN_FULL else ""
        raise CheckpointError(f"cannot {verb} {path}: {what}; {needed}{ADVICE.get(error.errno, ELSEWHERE)}") from error


def _is_outside(filename: Any, path: Path) -> bool:
    return isinstance(filename, str) and path not in (Path(filename), *Path(filename).parents)


def _free_bytes(path: Path) -> int | None:
    """Free bytes on the disk where `path` is or will be; None if the file system does not know."""
    usage = shutil.disk_usage(_nearest_existing(path))
    return usage.free if usage.total else None


def _nearest_existing(path: Path) -> Path:
    """The path itself, or its closest parent that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _check_parent(path: Path) -> None:
    above = _nearest_existing(path.parent)
    if not above.is_dir():
        raise RequestError(f"cannot create {path}: {above} is a file, expected a folder; {ELSEWHERE}")


def _check_target(path: Path, force: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise RequestError(f"{path} is a file, expected a folder or nothing; {ELSEWHERE}")
    names = sorted(entry.name for entry in path.iterdir())
    foreign = next((name for name in names if not (CHECKPOINT_FILE.fullmatch(name) or PARTIAL_FILE.fullmatch(name))), None)
    if names and not force:
        raise RequestError(f"{path} already holds {', '.join(names[:4])}…; --force replaces it, or {ELSEWHERE}")
    if foreign:
        raise RequestError(f"{path} holds {foreign}, which is not a checkpoint file; --force replaces checkpoints only")


def _make_partial(path: Path) -> tuple[Path, int]:
    """Create a hidden folder next to `path`, and the lock that shows other runs it is in use."""
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    fresh.mkdir()
    lock = os.open(fresh, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    # Renamed only when locked, because other runs delete unlocked .partial folders.
    return fresh.rename(fresh.with_suffix(".partial")), lock


def recover(path: Path) -> None:
    """Restore the folder that a killed run had renamed to make room for a new one."""
    for old in leftovers(path, ".old"):
        with suppress(OSError):
            if not path.exists():
                old.rename(path)
                logger.warning("restored %s, which an interrupted run had renamed", path)


def leftovers(path: Path, *suffixes: str) -> list[Path]:
    """Hidden folders next to `path` that interrupted runs left: `.partial`, `.new` and `.old`."""
    kinds = "|".join(map(re.escape, suffixes))
    pattern = re.compile(re.escape(f".{path.name}.") + rf"[0-9a-f]{{32}}({kinds})")
    with suppress(OSError):
        return sorted(entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name))
    return []


def _remove_leftovers(path: Path) -> None:
    for entry in leftovers(path, ".partial", ".new", ".old"):
        with suppress(OSError):  # in use, just deleted by another run, or another user's
            if entry.suffix == ".new" and time.time() - entry.stat().st_mtime < STARTING:
                continue
            _remove_unlocked(entry)
            logger.info("removed %s, which an interrupted run left", entry)


def _remove_unlocked(folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    finally:
        os.close(lock)
