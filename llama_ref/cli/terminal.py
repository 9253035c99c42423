"""How commands write to a terminal, a pipe or a file: tables, notes, progress bars.

rich is imported only when something is drawn with it: `--help` does not wait for it.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import ProgressColumn

WIDE = 160  # columns of a table that goes into a pipe or file


def print_rich(renderable: "RenderableType") -> None:
    """Print a table or text. Names in it are never read as markup.

    Where standard output is not a terminal its width is unknown, and no line is broken to fit one.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    with console.capture() as captured:
        console.print(renderable, soft_wrap=isinstance(renderable, Text))
    # Console.print itself would exit with 1 when the reader of a pipe has gone.
    print(captured.get(), end="")


def is_first_process() -> bool:
    """Whether this is rank 0 of torchrun's processes: the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def note(text: str) -> None:
    """Print a line for people, not part of the output: on stderr, once per job."""
    if is_first_process():
        print(text, file=sys.stderr)


@contextmanager
def progress_bar(description: str, *columns: "ProgressColumn") -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr, updated by calls of (done, total); once per job.

    Silent where stderr is not a terminal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    disable = not (console.is_terminal and is_first_process())
    drawn = (TextColumn(description), BarColumn(), *columns)
    with Progress(*drawn, console=console, transient=True, disable=disable) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def byte_bar(description: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """Show a progress bar that counts bytes."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    return progress_bar(description, DownloadColumn(), TransferSpeedColumn())
