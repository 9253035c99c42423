"""Read untrusted files: recognise kinds by their first bytes, limit sizes, check JSON."""

import codecs
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from llama_ref.errors import CheckpointError, RequestError, UnsupportedModel
from llama_ref.formatting import short
from llama_ref.opened_files import open_file

SNIFF_BYTES = 512  # enough to recognise all kinds below
UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
UTF_32_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)


def what_is(head: bytes) -> str | None:
    """Name a file's kind from its first bytes if it cannot be part of a checkpoint, else None.

    Expired download links leave web pages and error bodies under the names of weights, and clones
    without Git LFS leave pointers.
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
    "a run of zero bytes": "its space was reserved but never written, fetch that file again",
}


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading in the block.

    Raises CheckpointError if it is unreadable or not a file.
    """
    try:
        file = BufferedReader(open_file(path))
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise CheckpointError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error
    with file:
        try:
            yield file
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def read_head(path: Path, n: int = SNIFF_BYTES) -> bytes:
    """The first `n` bytes of `path`. Raises CheckpointError if it is unreadable or not a file."""
    with opened(path) as file:
        return file.read(n)


def is_link_loop(path: Path) -> bool:
    """Whether a link leads back to itself; `Path.exists` says False or raises, depending on Python."""
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def check_head(path: Path, expected: str) -> bytes:
    """The first bytes of `path`. Raises CheckpointError for an empty file, a web page etc."""
    with opened(path) as file:
        return check_head_of(file, expected)


def check_head_of(file: BinaryIO, expected: str) -> bytes:
    """The first bytes of an open file, as `check_head` reads them; the next read begins there too."""
    head = file.read(SNIFF_BYTES)
    file.seek(0)
    found = what_is(head)
    if found:
        raise CheckpointError(f"{file.name} is {found}, not {expected}: {ADVICE[found]}")
    return head


@contextmanager
def named_in_request(file: str | Path, what: str) -> Iterator[Path]:
    """The path of a file that a request names; the block reads it. Raises RequestError if it cannot be read."""
    try:
        yield Path(file).expanduser()
    except (CheckpointError, UnicodeDecodeError, RuntimeError) as error:  # the last: an unknown home directory
        raise RequestError(f"cannot read {what} in {file}: {error}") from error


def read_small(path: Path, limit_bytes: int, expected: str) -> bytes:
    """A small text file as UTF-8 without a byte-order mark; otherwise as `read_limited`."""
    return as_utf8(read_limited(path, limit_bytes, expected))


def read_limited(path: Path, limit_bytes: int, expected: str) -> bytes:
    """A file's bytes. Raises CheckpointError if it is not a plain file or exceeds `limit_bytes`."""
    with opened(path) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        check_size(path, n_bytes, limit_bytes, expected)
        check_head_of(file, expected)
        data = file.read(n_bytes + 1)  # read(n) allocates n bytes
    check_size(path, len(data), limit_bytes, expected)  # it may have grown
    return data


def check_size(path: Path, n_bytes: int, limit_bytes: int, expected: str) -> None:
    """Raise CheckpointError if a small file has more than `limit_bytes`."""
    if n_bytes > limit_bytes:
        raise CheckpointError(
            f"{path} is larger than {limit_bytes:,} bytes, far more than {expected} ever is; is it another file?"
        )


def as_utf8(data: bytes) -> bytes:
    """Text without its byte-order mark, in UTF-8; unmarked and invalid text as it is.

    Windows editors write a mark, and PowerShell's `>` writes UTF-16.
    """
    if data.startswith(codecs.BOM_UTF8):
        return data.removeprefix(codecs.BOM_UTF8)
    for encoding, marks in (("utf-32", UTF_32_MARKS), ("utf-16", UTF_16_MARKS)):
        if data.startswith(marks):  # UTF-32's mark begins with that of UTF-16
            with suppress(UnicodeDecodeError):
                return data.decode(encoding).encode("utf-8", "surrogatepass")
    return data


# ---- JSON


class BadValue(CheckpointError):
    """A wrong value in a JSON file; `json_object` adds the path to the message."""


class DuplicateKey(BadValue, ValueError):
    """An object has a key with different values."""


def read_json(path: Path, limit_bytes: int, expected: str) -> Any:
    """The content of a JSON file. Raises CheckpointError for invalid JSON and duplicate keys."""
    return parse_json(path, read_limited(path, limit_bytes, expected), expected)


def parse_json(path: Path, data: bytes, expected: str) -> Any:
    """The value of JSON that was read from `path`. Raises CheckpointError as `read_json` does."""
    data = as_utf8(data)
    try:
        return json.loads(data.decode(json.detect_encoding(data)), object_pairs_hook=unique_keys)
    except DuplicateKey as error:
        raise CheckpointError(f"{path}: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{path}: is nested far deeper than {expected}; is it another file?") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON, so it is not {expected} ({error}); fetch it again") from None


@contextmanager
def json_object(path: str | Path, expected: str, keys: str, limit_bytes: int) -> Iterator[dict[str, Any]]:
    """Yield the object in a JSON file; errors raised in the block get the path as a prefix.

    These are BadValue, which becomes a CheckpointError, and UnsupportedModel. `expected` says what
    the file should be and `keys` names some of its keys, for error messages.
    """
    content = read_json(Path(path), limit_bytes, expected)
    try:
        if not isinstance(content, dict):
            raise BadValue(f"holds {_json_type(content)}, expected an object with {keys}")
        yield content
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{path}: {error}") from None
    except BadValue as error:
        raise CheckpointError(f"{path}: {error}") from None


def unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dictionary. Raises DuplicateKey if a key has different values."""
    pairs = list(pairs)
    content = dict(pairs)
    if len(content) == len(pairs):
        return content
    first: dict[str, Any] = {}
    for key, value in pairs:
        if first.setdefault(key, value) != value:
            raise DuplicateKey(
                f'duplicate key "{key:.80}" with different values {short(first[key])} and {short(value)}; keep the right one'
            )
    return first


def renamed_keys(pairs: Iterable[tuple[str, Any]], names: Mapping[str, str]) -> dict[str, Any]:
    """The pairs as a dictionary with keys renamed by `names`; null means absent."""
    return unique_keys((names.get(key, key), value) for key, value in pairs if value is not None)


def require_keys(found: Mapping[str, Any], keys: Iterable[str], has: Mapping[str, Any] | None = None) -> None:
    """Raise BadValue, naming missing and existing keys, if any of `keys` is absent or null.

    `has` is the whole file, if `found` is only a part of it. A model that lacks only rope_theta is a
    Llama 2: UnsupportedModel.
    """
    has = found if has is None else has
    missing = [key for key in keys if found.get(key) is None]
    shown = f"it has {short(sorted(has)) if has else 'no keys at all'}"
    if missing == ["rope_theta"]:
        raise UnsupportedModel(f"lacks rope_theta (a Llama 2 has no rope_theta; only Llama 3 is supported); {shown}")
    if missing:
        raise BadValue(f"lacks {', '.join(missing)}; {shown}")


def _json_type(value: Any) -> str:
    return {list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(type(value), "a number")
