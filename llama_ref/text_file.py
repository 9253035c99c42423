"""Read a text file that a request names."""

from pathlib import Path

from llama_ref.errors import RequestError

LIMIT_BYTES = 1 << 30
BYTE_ORDER_MARK = "\ufeff"


def read_text(path: str | Path, too_large: str) -> str:
    """A file's text without a byte-order mark; `too_large` says what to do with a file above LIMIT_BYTES.

    Raises RequestError for a file that is larger, cannot be read, or is not UTF-8.
    """
    return decoded(path, read_bytes(path, too_large))


def read_bytes(path: str | Path, too_large: str) -> bytes:
    """The bytes of a file or a pipe. Raises RequestError as `read_text` does."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(LIMIT_BYTES + 1)  # a pipe or a device has no size
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise RequestError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > LIMIT_BYTES:
        raise RequestError(f"{path} has more than {LIMIT_BYTES:,} bytes: {too_large}")
    return data


def decoded(path: str | Path, data: bytes) -> str:
    """A file's bytes as text. Raises RequestError if they are not UTF-8."""
    try:
        return data.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at {error.start:,}; "
            "convert it first, for example with `iconv -t UTF-8`"
        ) from error
