"""What stands under a name in a folder, before any of it is opened."""

import time
from pathlib import Path

from llama_ref.checkpoint.folder import SHARD_NAME
from llama_ref.checkpoint.report import FileReport, State, human_bytes

PARTIAL_SUFFIXES = (".part", ".partial", ".incomplete", ".crdownload", ".download", ".tmp", ".aria2")


def checkpoint_files(folder: Path) -> list[str]:
    """The names of a checkpoint's files that are there, shards first; none if the folder cannot be listed."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []
    fixed = [name for name in ("params.json", "tokenizer.model") if name in names]
    return [name for name in names if SHARD_NAME.fullmatch(name) or name.startswith("fp8_scales")] + fixed


def cannot_be_opened(folder: Path, name: str) -> FileReport | None:
    """A report for a file that is missing, is no file, or lies outside the folder; such a one must not be opened."""
    path = folder / name
    try:
        if target := _outside(folder, path):
            return FileReport(name, State.REFUSED, detail=f"a link leads out of the folder, to {target}")
        if not path.exists():
            return FileReport(name, State.MISSING, detail=partial_download(path))
        if not path.is_file():
            detail = "not a plain file: a folder, a device or a pipe stands in its place"
            return FileReport(name, State.UNREADABLE, detail=detail)
    except RuntimeError:  # as pathlib says it before Python 3.13
        return FileReport(name, State.UNREADABLE, detail="a link that leads back to itself")
    except OSError as error:
        return FileReport(name, State.UNREADABLE, detail=error.strerror or str(error))
    return None


def _outside(folder: Path, path: Path) -> Path | None:
    """Where links on the way to `path` lead, if that is outside the folder."""
    target, home = path.resolve(), folder.resolve()
    return None if target.is_relative_to(home) or _is_own_blob(home, target) else target


def _is_own_blob(folder: Path, target: Path) -> bool:
    """Whether the link is one of Hugging Face's cache, from `snapshots/<revision>/…` to `blobs/` of the same repository."""
    return any(parent.name == "snapshots" and target.parent == parent.parent / "blobs" for parent in folder.parents)


def partial_download(path: Path) -> str:
    """A sentence about the unfinished download of a missing file, where one lies beside it."""
    for suffix in PARTIAL_SUFFIXES:
        size = size_of(path.with_name(path.name + suffix))
        if size is not None:
            return f"its download has not ended: {path.name}{suffix} is there with {human_bytes(size)}"
    return ""


def size_of(path: Path) -> int | None:
    """Bytes; None where there is nothing."""
    stamp = stamp_of(path)
    return stamp[0] if stamp else None


def stamp_of(path: Path) -> tuple[int, int] | None:
    """(bytes, time of the last change in nanoseconds): while both stay, so does the content."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def age_seconds(path: Path) -> float:
    """Time since the last change; infinite where there is nothing."""
    stamp = stamp_of(path)
    return time.time() - stamp[1] / 1e9 if stamp else float("inf")
