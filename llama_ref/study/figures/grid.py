"""Picture of activation patching: which cells of the clean run restore its answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llama_ref.study.figures import canvas
from llama_ref.study.figures.fonts import prompt, quoted, token_label
from llama_ref.study.figures.saving import save
from llama_ref.study.patching.grid import Grid, GridPair
from llama_ref.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL, WIDTH = (0.36, 0.18), 16.0  # inches: a cell, the widest map
MARGIN = 1.7  # inches left and right of the map
LISTED = 6  # best cells in the caption


def draw_grid(grid: Grid, pair: GridPair, tokenizer: Tokenizer, path: str | Path) -> None:
    """Draw the share of the clean answer that each cell of one of a pair's grids restores: layers × positions or heads.

    For a grid with positions and heads, each position shows its strongest head, and the caption lists the best cells.
    """
    save(path, grid_figure, grid, pair, tokenizer)


def grid_figure(grid: Grid, pair: GridPair, tokenizer: Tokenizer) -> "Figure":
    """A map from -100% to 100%, with numbers if there is room; labels show where the texts differ."""
    from matplotlib.colors import Normalize

    title, caption = _words(grid, pair, tokenizer)
    if len(grid.axes) == 3:
        grid = grid.strongest_heads()
    restored = grid.restored
    rows, columns = restored.shape
    height = canvas.row_height(CELL[1], rows)
    figure = canvas.new_figure(min(columns * CELL[0], WIDTH) + MARGIN, rows * height + 1.2, title, caption)
    cell = ((figure.get_figwidth() - MARGIN) / columns, height)
    axes = figure.subplots()
    image = canvas.heat_map(axes, restored, Normalize(-1, 1), canvas.DIFFERENCES)
    if cell[0] >= canvas.NUMBERED:
        canvas.write_cells(axes, image, [map(canvas.percent, row) for row in restored.tolist()], cell)
    canvas.name_ticks(axes, "y", grid.labels[0], cell[1])
    canvas.name_axis(axes, "y", grid.axes[0])
    if grid.axes[1] == "position":
        canvas.name_ticks(axes, "x", _columns(pair.clean, pair.corrupted, tokenizer), cell[0], range(columns))
        canvas.name_axis(axes, "x", "token of the corrupted text (← of the clean text, where they differ)")
    else:
        canvas.name_ticks(axes, "x", grid.labels[1], cell[0])
        canvas.name_axis(axes, "x", grid.axes[1])
    size, name = (columns * cell[0], rows * cell[1]), "share restored"
    bar = canvas.color_bar(figure, image, axes, name, size, extend=_beyond(restored))
    bar.ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    return figure


def _beyond(restored: np.ndarray) -> str:
    """Which ends of the colour scale some cells exceed, as matplotlib's `extend`."""
    less, more = (restored < -1).any(), (restored > 1).any()
    return "both" if less and more else "min" if less else "max" if more else "neither"


def _columns(clean: Sequence[int], corrupted: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    pairs = zip(clean, corrupted, strict=True)
    names = [(token_label(tokenizer, right), token_label(tokenizer, wrong)) for right, wrong in pairs]
    return [wrong if right == wrong else f"{wrong}\n← {right}" for right, wrong in names]


def _words(grid: Grid, pair: GridPair, tokenizer: Tokenizer) -> tuple[str, str]:
    """Title and caption."""
    metric = f"{pair.measure.capitalize()} of {quoted(tokenizer, pair.target)}"
    if pair.other is not None:
        metric = f"{quoted(tokenizer, pair.target)} ahead of {quoted(tokenizer, pair.other)}"
    has_heads = len(grid.axes) == 3
    title = f"{metric}: what each {'position’s strongest head' if has_heads else grid.axes[1]} restores"
    names = [f"{name} ({value:.3g})" for name, value in (("Clean", grid.clean), ("Corrupted", grid.corrupted))]
    how = f"Each cell takes {grid.name} from the clean run; values in percent of the difference between the two texts."
    if has_heads and (best := grid.best_cells(LISTED)):
        tokens = [token_label(tokenizer, token) for token in pair.corrupted]
        listed = "; ".join(f"{grid.cell_name(index, tokens)} {canvas.percent(share)}%" for share, index in best)
        how = f"{how}\nMost: {listed}"
    return title, f"{how}\n{prompt(tokenizer, pair.clean, pair.corrupted, names=names)}"
