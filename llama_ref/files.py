"""What a file really is, before anything trusts its name."""

from collections import Counter
from pathlib import Path
from typing import Any

from llama_ref.errors import CheckpointError

SNIFF_BYTES = 512  # enough to recognise every kind below


def what_is(head: bytes) -> str | None:
    """Name what a file's first bytes show it to be, where that is surely not a checkpoint's; None if nothing is recognised.

    Expired or unauthenticated download links leave web pages and error bodies under the names of weights, and a clone
    without Git LFS leaves pointers: these are what people meet, so these are what is told apart.
    """
    if not head:
        return "an empty file"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<!--")):
        return "an HTML page"
    if text.startswith((b"<?xml", b"<error")):
        return "an XML error body"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    if text.startswith((b'{"error', b'{"message', b'{"detail', b'{"code"')):
        return "a JSON error body"
    if not head.strip(b"\0"):
        return "a run of zero bytes"
    return None


ADVICE = {  # no semicolons: reports put several of these into one sentence
    "an empty file": "the download did not start, fetch that file again",
    "an HTML page": "the download link had expired or asked for a login, get a fresh link and fetch it again",
    "an XML error body": "the server refused the download, get a fresh link and fetch it again",
    "a JSON error body": "the server refused the download, get a fresh link and fetch it again",
    "a Git LFS pointer": "the repository was cloned without its large files, run `git lfs pull` in it",
    "a run of zero bytes": "its space was set aside but never written, fetch that file again",
}


def read_head(path: Path, n: int = SNIFF_BYTES) -> bytes:
    """The first `n` bytes of `path`. Raises CheckpointError when it cannot be read or is not a plain file."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is not a plain file (a folder, a device or a pipe stands in its place)")
        with path.open("rb") as file:
            return file.read(n)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise CheckpointError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error


def refuse_impostor(path: Path, expected: str) -> bytes:
    """Raise CheckpointError if `path` is a web page, an error body, a pointer or empty; return its first bytes otherwise."""
    head = read_head(path)
    found = what_is(head)
    if found:
        raise CheckpointError(f"{path} is {found}, not {expected}: {ADVICE[found]}")
    return head


def read_small(path: Path, limit_bytes: int, expected: str) -> bytes:
    """All bytes of a file that has no business being large. Raises CheckpointError beyond `limit_bytes`."""
    refuse_impostor(path, expected)
    with path.open("rb") as file:
        data = file.read(min(limit_bytes, path.stat().st_size) + 1)  # room for what is there, not for the limit
    if len(data) > limit_bytes:
        raise CheckpointError(
            f"{path} is larger than {limit_bytes:,} bytes, far more than {expected} ever is; is it another file?"
        )
    return data


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's content, as json's `object_pairs_hook`. Raises ValueError for a name that stands twice in it."""
    content = dict(pairs)
    if len(content) != len(pairs):
        name, times = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name!r:.80} stands {times} times in one object")
    return content
