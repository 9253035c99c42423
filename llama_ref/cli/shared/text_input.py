"""Decode text from standard input, in UTF-8 or a given encoding, and from the command line."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from encodings.aliases import aliases
from typing import Annotated

from llama_ref.cli.parsing.flags import Flag
from llama_ref.errors import RequestError
from llama_ref.formatting import did_you_mean
from llama_ref.text_file import BYTE_ORDER_MARK

INVALID_BYTE = re.compile("[\udc80-\udcff]")  # as `surrogateescape` decodes it
UTF_16_MARKS = ("\udcff\udcfe", "\udcfe\udcff")  # the byte-order marks, decoded as UTF-8
EXAMPLES = "such as cp949 (Korean Windows), cp1252 or utf-16"
OTHER = f"give the text's encoding with --encoding, {EXAMPLES}"


def known_encoding(name: str) -> str:
    """Check the name of an encoding. Raises RequestError if Python does not know it."""
    try:
        b"x".decode(name, "replace")
    except LookupError:  # unknown, or not a text encoding (such as hex)
        meant = did_you_mean(name, set(aliases.values()))
        raise RequestError(f"--encoding is {name!r:.60}, expected an encoding {EXAMPLES}{meant}") from None
    return name


Encoding = Annotated[
    str | None,
    Flag(
        "encoding of standard input, such as cp949 or utf-16",
        metavar="ENCODING",
        unset="UTF-8",
        read=known_encoding,
    ),
]


def decode_stdin(encoding: str | None) -> None:
    """Set the encoding of standard input; the default is UTF-8, or a terminal's own.

    Invalid bytes become lone surrogates, which `checked` rejects.
    """
    if not hasattr(sys.stdin, "reconfigure"):
        return  # a stream of text, such as StringIO
    if encoding is None:
        encoding = sys.stdin.encoding if sys.stdin.isatty() else "utf-8"
    sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")


def read_stdin(encoding: str | None = None) -> str:
    """Read all of standard input. Raises RequestError if it is not text."""
    decode_stdin(encoding)
    with readable():
        return checked(sys.stdin.read())


@contextmanager
def readable() -> Iterator[None]:
    """Turn a decoder's error into a RequestError: not all decoders support `surrogateescape`."""
    try:
        yield
    except UnicodeError as error:
        raise RequestError(f"standard input is not {sys.stdin.encoding}: {error}; {OTHER}") from error


def checked(text: str) -> str:
    """Remove a byte-order mark from a text from stdin. Raises RequestError if it is not text."""
    if text.startswith(UTF_16_MARKS) or "\0" in text:
        raise RequestError("standard input is UTF-16 or not text at all: for UTF-16, give --encoding utf-16")
    invalid = INVALID_BYTE.search(text)
    if invalid:
        before = text[: invalid.start()][-20:]
        raise RequestError(
            f"standard input is not {_encoding()}: there is a byte 0x{ord(invalid[0]) - 0xDC00:02x} after {before!r}; {OTHER}"
        )
    return text.removeprefix(BYTE_ORDER_MARK)


def text_word(word: str) -> str:
    """Check a text on the command line. Raises RequestError if it is not UTF-8."""
    if INVALID_BYTE.search(word):
        raise RequestError(f"{word!a:.60} is not UTF-8: set the terminal to UTF-8, or pipe the text in with --encoding")
    return word


def _encoding() -> str:
    return (getattr(sys.stdin, "encoding", None) or "utf-8").upper()
