"""Files of text to score, with what names them beside a figure."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_ref.errors import RequestError

LIMIT_BYTES = 1 << 30
BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class TextFile:
    """A file's text, and the size in bytes and the SHA-256 of the file."""

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
    try:
        with Path(path).open("rb") as file:
            data = file.read(LIMIT_BYTES + 1)  # a pipe or a device has no size
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > LIMIT_BYTES:
        raise RequestError(f"{path} has more than {LIMIT_BYTES:,} bytes: score a part of it")
    try:
        text = data.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at {error.start:,}; convert it first, as by `iconv -t UTF-8`"
        ) from error
    if not text:
        raise RequestError(f"{path} is empty, expected a text to score")
    return TextFile(path, text, len(data), hashlib.sha256(data).hexdigest())
