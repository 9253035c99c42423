"""Write a checkpoint folder, or its list of sums, so that it is there whole or not at all."""

import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama_ref.checkpoint.checklist import CHECKLIST_NAME, format_entry
from llama_ref.checkpoint.hashing import Progress, hash_files
from llama_ref.errors import CheckpointError, RequestError

if sys.platform != "win32":
    import fcntl

CHECKPOINT_FILE = re.compile(r"params\.json|tokenizer\.model|checklist\.chk|consolidated\.\d{2,}\.pth|README\.md")


@contextmanager
def new_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill, which becomes `path` when the block ends well and vanishes when it does not.

    It lies beside `path` under a hidden name, so that a killed run leaves nothing that looks like a checkpoint; the next run
    for the same `path` clears that away. Raises RequestError where `path` is taken, unless `force` is given and it holds
    nothing but a checkpoint's files.
    """
    path = Path(path).expanduser().resolve()
    _refuse_taken(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    partial, lock = _make_partial(path)
    try:
        yield partial
        _refuse_taken(path, force)  # someone else may have been quicker
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def write_params(folder: Path, params: Mapping[str, Any]) -> None:
    """Write params.json on one line, as Meta does."""
    (folder / "params.json").write_text(json.dumps(params) + "\n")


def write_sums(
    folder: Path, names: Iterable[str], algorithm: str = "md5", jobs: int | None = None, progress: Progress | None = None
) -> Path:
    """Write checklist.chk over the named files of a folder, whole or not at all; return its path.

    The files are hashed `jobs` at a time (default: one per core). Raises CheckpointError where one cannot be read, or the list
    cannot be written.
    """
    target, names = folder / CHECKLIST_NAME, sorted(names)
    found = hash_files([(folder / name, algorithm) for name in names], jobs, progress)
    for path, hashed in found.items():
        if isinstance(hashed, OSError):
            raise CheckpointError(f"cannot read {path}: {hashed.strerror}; no list was written")
    _write_atomically(target, b"".join(format_entry(name, found[folder / name].sum) for name in names))
    return target


def _write_atomically(target: Path, data: bytes) -> None:
    partial_file = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial_file.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial_file.replace(target)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror}") from error
    finally:
        partial_file.unlink(missing_ok=True)


def _refuse_taken(path: Path, force: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise RequestError(f"{path} is a file, expected a folder or nothing; give another --out")
    names = sorted(entry.name for entry in path.iterdir())
    strangers = [name for name in names if not CHECKPOINT_FILE.fullmatch(name)]
    if names and not force:
        raise RequestError(f"{path} already holds {', '.join(names[:4])}…; --force replaces it, or give another --out")
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
        if not leftover.fullmatch(entry.name):
            continue
        lock = os.open(entry, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(entry)
        except BlockingIOError:
            pass  # another run is writing it at this moment
        finally:
            os.close(lock)
