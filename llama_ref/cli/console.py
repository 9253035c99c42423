"""rich's console, with texts that send no commands to the terminal."""

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

    The colors and cursor movements that rich itself adds pass the stream, which would escape them.
    """

    def __init__(self, *, stderr: bool = False, **options: Any):
        file = unescaped(sys.stderr if stderr else sys.stdout)
        super().__init__(file=file, markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape the text of a cell or title before its width is measured."""
        return super().render_str(escape_controls(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Escape what is drawn from ready-made `Text`."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escape_controls(segment.text))

    def print_safely(self, renderable: RenderableType, **options: Any) -> None:
        """Print as `print` does: Console.print would exit with 1 when the reader of a pipe has gone."""
        self.file.flush()  # earlier lines: the capture would flush them, and exit with 1 too
        with self.capture() as captured:
            self.print(renderable, **options)
        print(captured.get(), end="", file=self.file, flush=True)
