"""Standard output and error on a terminal: what is printed there sends no commands to it.

Names of files, error messages and the text that a model writes may hold any character. Instead of
every place that prints one, the streams themselves escape control characters. Pipes and files get
all characters as they are.
"""

import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO, cast

from llama_ref.formatting import escape_controls


class TerminalStream:
    """A terminal's stream that escapes control characters, and otherwise behaves like the stream itself."""

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
    """Let standard output and error escape control characters where they are terminals."""
    sys.stdout, sys.stderr = _escaping(sys.stdout), _escaping(sys.stderr)


def unescaped(stream: TextIO) -> TextIO:
    """The stream for text that was escaped before, with commands of our own, such as colors."""
    return stream.unescaped if isinstance(stream, TerminalStream) else stream


def _escaping(stream: TextIO) -> TextIO:
    if isinstance(stream, TerminalStream) or not stream.isatty():
        return stream
    os.environ.setdefault("PYTHON_COLORS", "0")  # those of a traceback would be escaped as well
    return cast(TextIO, TerminalStream(stream))
