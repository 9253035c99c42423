"""A rich console on which printed text cannot send commands to the terminal."""

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from llama_ref.cli.escapes import unescaped
from llama_ref.formatting import escape_controls


class SafeConsole(Console):
    """Draws on standard output or error. Texts are escaped and never read as markup.

    Writes to the unescaped stream, because TerminalStream would escape rich's own colors too.
    """

    def __init__(self, *, stderr: bool = False, **options: Any):
        file = unescaped(sys.stderr if stderr else sys.stdout)
        super().__init__(file=file, markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape the text of a cell or title, before rich measures its width."""
        return super().render_str(escape_controls(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Escape `Text` objects, which `render_str` does not see."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escape_controls(segment.text))

    def print_safely(self, renderable: RenderableType, **options: Any) -> None:
        """Print with the builtin `print`: Console.print exits with code 1 if a pipe is closed."""
        self.file.flush()  # the capture would flush earlier lines, and exit with 1 too
        with self.capture() as captured:
            self.print(renderable, **options)
        print(captured.get(), end="", file=self.file, flush=True)
