"""How commands write to a terminal, a pipe or a file: tables, progress bars."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.text import Text

WIDE = 160  # columns of a table that goes into a pipe or file


def print_rich(renderable: RenderableType) -> None:
    """By way of `print`: Console.print would end the program itself, with 1, when the reader of a pipe has gone.

    A name is no markup, whatever brackets and colons it holds. Where standard output is no terminal nobody knows its width,
    and no line is broken to fit one.
    """
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    with console.capture() as captured:
        console.print(renderable, soft_wrap=isinstance(renderable, Text))
    print(captured.get(), end="")


def is_first_process() -> bool:
    """Whether this is the one of torchrun's processes that talks: all make the same text."""
    return os.environ.get("RANK", "0") == "0"


def note(text: str) -> None:
    """Tell a person something that is no part of the output: on stderr, once a job."""
    if is_first_process():
        print(text, file=sys.stderr)


@contextmanager
def progress_bar(description: str, *columns: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, moved on by calls of (done, in all); silent where stderr is no terminal, and once a job."""
    console = Console(stderr=True)
    disable = not (console.is_terminal and is_first_process())
    with Progress(TextColumn(description), BarColumn(), *columns, console=console, transient=True, disable=disable) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
