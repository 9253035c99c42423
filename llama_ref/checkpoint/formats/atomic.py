"""Write a checkpoint folder, one of its files, or its list of sums, so that it is there whole or not at all."""

import errno
import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from llama_ref.checkpoint.verify.checklist import CHECKLIST_NAME, format_entry
from llama_ref.checkpoint.verify.hashing import hash_files
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.formatting import human_bytes
from llama_ref.progress import FileProgress

CHECKPOINT_FILE = re.compile(
    r"params\.json|tokenizer\.model|checklist\.chk|consolidated\.\d{2,}\.pth|README\.md"
    r"|(generation_)?config\.json|(tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json"
    r"|chat_template\.(jinja|json)|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)
ELSEWHERE = "choose another folder"
ADVICE_WHEN_FULL: dict[int | None, str] = {  # by OSError.errno
    errno.ENOSPC: "free some space there or choose another folder",
    errno.EDQUOT: "your quota there is used up: free some of it or choose another folder",
    errno.EFBIG: "files may not be that large there: raise the limit (ulimit -f) or choose another folder",
}
ADVICE = ADVICE_WHEN_FULL | {errno.EEXIST: "remove it or choose another name"}


@contextmanager
def new_folder(path: str | Path, *, force: bool = False, n_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty folder to fill, which becomes `path` when the block ends well and vanishes when it does not.

    It lies beside `path` under a hidden name, so that a killed run leaves nothing that looks like a checkpoint; the next run
    for the same `path` clears that away. `n_bytes` is about how much will be written, where that is known. Raises
    RequestError where `path` is taken, unless `force` is given and it holds nothing but a checkpoint's files; CheckpointError
    where it cannot be written (a full disk, no permission): any OSError in the block becomes one.
    """
    path = Path(path).expanduser()
    with _os_errors_told(path, "create"):
        path = path.resolve()
        _check_target(path, force)
        _check_parent(path)
        check_free_space(path, n_bytes)
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        partial, lock = _make_partial(path)
    try:
        with _os_errors_told(partial, "write"):
            yield partial
            _check_target(path, force)  # someone else may have been quicker
            if path.exists():
                shutil.rmtree(path)
            partial.rename(path)
    except CheckpointError as error:
        raise type(error)(str(error).replace(str(partial), str(path))) from error  # nobody knows the hidden name
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


@contextmanager
def new_file(path: Path, n_bytes: int) -> Iterator[BinaryIO]:
    """Yield a new file to fill with about `n_bytes`; it vanishes when the block fails.

    Raises CheckpointError where there is no room for it, it is there already, or it cannot be written.
    """
    check_free_space(path, n_bytes)
    with _os_errors_told(path, "write", n_bytes), path.open("xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())  # some file systems tell of a full disk only now
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def check_free_space(path: str | Path, n_bytes: int) -> None:
    """Raise CheckpointError if `n_bytes` surely do not fit where `path` is or is to be."""
    path = Path(path)
    with _os_errors_told(path, "write"):
        free = _free_bytes(path)
    if free is not None and n_bytes > free:
        raise CheckpointError(
            f"cannot write {path}: it needs {human_bytes(n_bytes)} and {human_bytes(free)} are free there; "
            f"{ADVICE_WHEN_FULL[errno.ENOSPC]}"
        )


def write_params(folder: Path, params: Mapping[str, Any]) -> None:
    """Write params.json on one line, as Meta does."""
    (folder / "params.json").write_text(json.dumps(params) + "\n")


def write_sums(
    folder: Path, names: Iterable[str], algorithm: str = "md5", jobs: int | None = None, progress: FileProgress | None = None
) -> Path:
    """Write checklist.chk over the named files of a folder, whole or not at all; return its path.

    The files are hashed `jobs` at a time (default: one per core). Raises CheckpointError where one cannot be read, or the list
    cannot be written.
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
        with whole_file(target) as file:
            file.write(data)
    except OSError as error:
        advice = ADVICE_WHEN_FULL.get(error.errno, "allow writing there")
        raise CheckpointError(f"cannot write {target}: {error.strerror}; {advice}") from error


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that becomes `path`, in place of one that is there, when the block ends well, and vanishes when it does not.

    Raises OSError where it cannot be written.
    """
    partial_file = path.with_name(f".{path.stem[:40]}.{uuid.uuid4().hex}.partial")  # nobody else's, whoever writes beside us
    with partial_file.open("xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())  # some file systems tell of a full disk only now
            partial_file.replace(path)
        finally:
            with suppress(OSError):
                partial_file.unlink(missing_ok=True)


@contextmanager
def _os_errors_told(path: Path, verb: str, n_bytes: int = 0) -> Iterator[None]:
    """Turn an OSError of the block into a CheckpointError that says what to do."""
    try:
        yield
    except ConnectionError:
        raise  # whoever reads our output has gone, which is nothing about files
    except OSError as error:
        what = error.strerror or error
        if verb == "write" and _is_elsewhere(error.filename, path):  # a file that was read to fill this one
            raise CheckpointError(f"cannot use {error.filename}: {what}; nothing was written") from error
        needed = f"it needs {human_bytes(n_bytes)}; " if n_bytes and error.errno in ADVICE_WHEN_FULL else ""
        raise CheckpointError(f"cannot {verb} {path}: {what}; {needed}{ADVICE.get(error.errno, ELSEWHERE)}") from error


def _is_elsewhere(filename: Any, path: Path) -> bool:
    return isinstance(filename, str) and path not in (Path(filename), *Path(filename).parents)


def _free_bytes(path: Path) -> int | None:
    """What is free on the disk that `path` is on or will be; None where the file system does not know."""
    usage = shutil.disk_usage(_nearest(path))
    return usage.free if usage.total else None


def _nearest(path: Path) -> Path:
    """The path itself or the closest above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _check_parent(path: Path) -> None:
    above = _nearest(path.parent)
    if not above.is_dir():
        raise RequestError(f"cannot create {path}: {above} is a file, expected a folder; {ELSEWHERE}")


def _check_target(path: Path, force: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise RequestError(f"{path} is a file, expected a folder or nothing; {ELSEWHERE}")
    names = sorted(entry.name for entry in path.iterdir())
    strangers = [name for name in names if not CHECKPOINT_FILE.fullmatch(name)]
    if names and not force:
        raise RequestError(f"{path} already holds {', '.join(names[:4])}…; --force replaces it, or {ELSEWHERE}")
    if strangers:
        raise RequestError(f"{path} holds {strangers[0]}, which is no checkpoint's; --force replaces checkpoints only")


def _make_partial(path: Path) -> tuple[Path, int]:
    """A new hidden folder beside `path` and the lock that tells other runs that it is still being written."""
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    fresh.mkdir()
    lock = os.open(fresh, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return fresh.rename(fresh.with_suffix(".partial")), lock  # renamed once locked: others remove unlocked .partial folders


def _remove_leftovers(path: Path) -> None:
    leftover = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{32}\.partial")
    for entry in path.parent.iterdir():
        if leftover.fullmatch(entry.name):
            with suppress(OSError):  # another run is writing it at this moment, or clearing it away, or it is another user's
                _remove_unlocked(entry)


def _remove_unlocked(folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    finally:
        os.close(lock)
