"""Write to a terminal, a pipe or a file: tables, notes, progress bars.

rich is imported only to draw something: `--help` does not wait for it.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llama_ref.errors import RequestError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress, ProgressColumn

    from llama_ref.cli.console import SafeConsole

WIDE = 160  # columns of a table that goes into a pipe or file


def print_rich(renderable: "RenderableType") -> None:
    """Print a table or text. Names in it are not read as markup or as terminal commands."""
    from rich.text import Text

    output_console().print_safely(renderable, soft_wrap=isinstance(renderable, Text))


def output_console() -> "SafeConsole":
    """Return a console on standard output; a wide one for a pipe or file, which has no width."""
    from llama_ref.cli.console import SafeConsole

    console = SafeConsole()
    if not console.is_terminal:
        console.width = WIDE
    return console


def print_path(path: Path) -> None:
    """Print the path of what was written; to a pipe byte for byte, for scripts."""
    if sys.stdout.isatty() or not hasattr(sys.stdout, "buffer"):
        print(path)
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(path) + b"\n")


def is_first_process() -> bool:
    """Whether this is rank 0 of torchrun's processes, which is the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def check_one_writer() -> None:
    """Raise RequestError if torchrun started several processes, which would all write the same files."""
    n_processes = os.environ.get("WORLD_SIZE", "1")
    if n_processes != "1":
        raise RequestError(f"{n_processes} processes would write the same files: start it without torchrun")


def note(text: str) -> None:
    """Print a line for people, not part of the output: on stderr, once per job."""
    if is_first_process():
        print(text, file=sys.stderr)


@contextmanager
def progress_bar(description: str, *columns: "ProgressColumn") -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr, updated by calls of (done, total); once per job.

    Silent where stderr is not a terminal.
    """
    from rich.progress import BarColumn, TextColumn

    drawn = (TextColumn(description, markup=False), BarColumn(), *columns)
    with live_progress(*drawn) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def live_progress(*columns: "ProgressColumn") -> Iterator["Progress"]:
    """Show rich's progress bars on stderr, below other printed lines."""
    from rich.progress import Progress

    from llama_ref.cli.console import SafeConsole
    from llama_ref.cli.escapes import escape_on_terminals

    console = SafeConsole(stderr=True)
    disable = not (console.is_terminal and is_first_process())
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        if not disable:  # rich wraps the streams in its own, which would let colors through
            escape_on_terminals()
        yield progress


def byte_bar(description: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """Show a progress bar that counts bytes."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    return progress_bar(description, DownloadColumn(), TransferSpeedColumn())
