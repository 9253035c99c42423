"""Escape control characters on terminals, so that printed text cannot send commands to them.

File names, error messages and generated text may contain any character. The streams do the
escaping, so that code that prints does not have to. Pipes and files get all characters unchanged.
"""

import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO, cast

from llama_ref.formatting import escape_controls


class TerminalStream:
    """A terminal's stream that escapes control characters and otherwise behaves the same."""

    def __init__(self, stream: TextIO):
        self.unescaped = stream

    def write(self, text: str) -> int:
        self.unescaped.write(escape_controls(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


def escape_on_terminals() -> None:
    """Make standard output and error escape control characters if they are terminals."""
    sys.stdout, sys.stderr = _escaping(sys.stdout), _escaping(sys.stderr)


def unescaped(stream: TextIO) -> TextIO:
    """Return the underlying stream, for text that is already escaped and has our own colors."""
    return stream.unescaped if isinstance(stream, TerminalStream) else stream


def _escaping(stream: TextIO) -> TextIO:
    if isinstance(stream, TerminalStream) or not stream.isatty():
        return stream
    os.environ.setdefault("PYTHON_COLORS", "0")  # a traceback's colors would be escaped too
    return cast(TextIO, TerminalStream(stream))
