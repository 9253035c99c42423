"""Explain a missing file: its download is not finished, or it exists under another name."""

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from llama_ref.formatting import human_bytes

PARTIAL_SUFFIXES = (".part", ".partial", ".incomplete", ".crdownload", ".download", ".tmp", ".aria2")
OWN_STATE = ".part.json"  # of `llama-ref download`
# How browsers, file managers and wget name a second copy; Korean Windows and macOS say 복사본 and 사본.
COPY_MARK = r"(?: ?\(\d+\)| ?[-_]? ?(?:copy|복사본|사본)(?: ?\(?\d+\)?)?)"
LATER_MARK = r"(?:\.\d+|\.bak|\.old|\.orig|\.txt)"


def hint_about(path: Path) -> str:
    """A sentence about a missing file's unfinished download or other name; empty without either."""
    return _partial_download(path) or _other_name(path)


def with_hint(path: Path) -> str:
    """The missing file's name, with the hint about it in brackets."""
    hint = hint_about(path)
    return f"{path.name} ({hint})" if hint else path.name


def _partial_download(path: Path) -> str:
    """A sentence about an unfinished download, next to the file or in the hub's cache."""
    if path.with_name(path.name + OWN_STATE).exists():  # its .part has the full length from the start
        return "its download has not finished: `llama-ref download` resumes it"
    for suffix in PARTIAL_SUFFIXES:
        size = _size(path.with_name(path.name + suffix))
        if size is not None:
            return f"its download has not finished: {path.name}{suffix} has {human_bytes(size)}"
    sizes = [size for part in _hub_parts(path.parent) if (size := _size(part)) is not None]
    if sizes:  # named by checksum, so we cannot tell which file they are
        what = "a download has" if len(sizes) == 1 else f"{len(sizes)} downloads have"
        return f"{what} not finished: Hugging Face's cache holds {human_bytes(sum(sizes))} in .incomplete files"
    return ""


def _other_name(path: Path) -> str:
    """A sentence about a file in the same folder whose name looks like a copy's."""
    stem = re.sub(r"0*(\d+)", r"0*\1", re.escape(path.stem))  # 01 may have become 1
    pattern = re.compile(rf"(?:copy of )?{stem}{COPY_MARK}?{re.escape(path.suffix)}{LATER_MARK}?", re.IGNORECASE)
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if entry.name != path.name and entry.is_file())
    except OSError:
        return ""
    found = next((name for name in names if pattern.fullmatch(unicodedata.normalize("NFC", name))), None)
    return f"{found} may be it: if so, rename it" if found else ""


def _hub_parts(folder: Path) -> Iterator[Path]:
    """Unfinished downloads of huggingface_hub, in the folder's `.cache` or the cache's `blobs`."""
    try:
        for home in (folder, folder.parent):  # the parent, for a repository's original/
            yield from (home / ".cache" / "huggingface" / "download").rglob("*.incomplete")
        for parent in folder.resolve().parents:
            if parent.name == "snapshots":
                yield from (parent.parent / "blobs").glob("*.incomplete")
    except (OSError, RuntimeError):
        return


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
