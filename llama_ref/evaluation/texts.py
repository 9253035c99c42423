"""Text files to score, with the size and SHA-256 that identify them in reports."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from llama_ref.errors import RequestError
from llama_ref.text_file import decoded, read_bytes


@dataclass(frozen=True)
class TextFile:
    """A file's text, and the file's size in bytes and SHA-256."""

    path: str
    text: str
    n_bytes: int
    sha256: str


def read_texts(paths: Sequence[str]) -> list[TextFile]:
    """Read files. Raises RequestError for one that is missing, empty, too large or not UTF-8."""
    if not paths:
        raise RequestError("no file to score, expected at least one")
    return [_read(path) for path in paths]


def _read(path: str) -> TextFile:
    data = read_bytes(path, "score a part of it")
    text = decoded(path, data)
    if not text:
        raise RequestError(f"{path} is empty, expected a text to score")
    return TextFile(path, text, len(data), hashlib.sha256(data).hexdigest())
