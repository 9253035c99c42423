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
        size = Path(path).stat().st_size
        if size > LIMIT_BYTES:
            raise RequestError(f"{path} has {size:,} bytes, expected at most {LIMIT_BYTES:,}: score a part of it")
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        text = data.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at {error.start:,}; convert it first, as by `iconv -t UTF-8`"
        ) from error
    if not text:
        raise RequestError(f"{path} is empty, expected a text to score")
    return TextFile(path, text, len(data), hashlib.sha256(data).hexdigest())
