"""Write a checkpoint folder so that it is there whole or not at all."""

import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama_ref.checkpoint.checklist import CHECKLIST_NAME, format_entry
from llama_ref.checkpoint.hashing import hash_file
from llama_ref.errors import RequestError

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


def write_sums(folder: Path) -> None:
    """Write checklist.chk over all other files of a folder that was just made, whole or deliberately not."""
    files = sorted(path for path in folder.iterdir() if path.name != CHECKLIST_NAME)
    (folder / CHECKLIST_NAME).write_bytes(b"".join(format_entry(path.name, hash_file(path)) for path in files))


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
