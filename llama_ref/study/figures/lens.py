"""Pictures of the logit lens: predictions by layer and position, and one target by layer."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llama_ref.errors import RequestError
from llama_ref.study.analyses.logit_lens import LogitLens, block_ends
from llama_ref.study.figures import canvas
from llama_ref.study.figures.fonts import prompt, quoted, token_label
from llama_ref.study.figures.saving import save
from llama_ref.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

MOST_WORDS = 36  # positions with words in their cells; a longer text gets two maps: all positions, and the last ones
WIDTH, HEIGHT, LOW = 0.56, 0.18, 0.08  # inches: a cell with a word, a row without words
MARGIN = 1.7  # inches left and right of a map
LOWEST = 1e-20  # lowest probability on the curve's axis
LEAST = 1e-6  # lowest probability on the map's colour scale


def draw_lens(lens: LogitLens, tokenizer: Tokenizer, path: str | Path) -> None:
    """Draw each layer's most likely next token; colours show its probability, or the target's."""
    save(path, lens_figure, lens, tokenizer)


def draw_target(lens: LogitLens, tokenizer: Tokenizer, path: str | Path) -> None:
    """Draw the target's probability and rank after the last position, at all points of the lens."""
    save(path, target_figure, lens, tokenizer)


# ---- all positions


def lens_figure(lens: LogitLens, tokenizer: Tokenizer) -> "Figure":
    """A map of layers × positions with words; for a long text, an overview above its end."""
    T, n_rows = len(lens.positions), len(block_ends(lens.points))
    n_words, low, high = min(T, MOST_WORDS), canvas.row_height(LOW, n_rows), canvas.row_height(HEIGHT, n_rows)
    heights = [n_rows * low, n_rows * high] if n_words < T else [n_rows * high]
    figure = canvas.new_figure(MARGIN + n_words * WIDTH, sum(heights) + len(heights), *_lens_words(lens, tokenizer))
    width = figure.get_figwidth() - MARGIN
    panels = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    if n_words < T:
        image = _draw_map(panels[0], lens, tokenizer, range(T), (width / T, low))
        panels[0].axvspan(T - n_words - 0.5, T - 0.5, facecolor="none", edgecolor=canvas.ORANGE)
    cell = (width / n_words, high)
    image = _draw_map(panels[-1], lens, tokenizer, range(T - n_words, T), cell)
    _write_words(panels[-1], image, lens, tokenizer, range(T - n_words, T), cell)
    token = "the most likely next token" if lens.target is None else quoted(tokenizer, lens.target)
    extend = "neither" if lens.target is None else "min"
    canvas.color_bar(figure, image, list(panels), f"probability of {token}", (width, sum(heights)), extend=extend)
    return figure


def _draw_map(axes: "Axes", lens: LogitLens, tokenizer: Tokenizer, columns: range, cell: tuple[float, float]) -> "AxesImage":
    from matplotlib.colors import LogNorm, Normalize

    ends = block_ends(lens.points)
    if lens.target_probability is None:
        values, norm = lens.top_probabilities[ends][:, columns, 0], Normalize(0, 1)
    else:
        values, norm = lens.target_probability[ends][:, columns].clamp(min=LEAST), LogNorm(LEAST, 1)
    image = canvas.heat_map(axes, values.numpy(), norm)
    positions = [lens.positions[column] for column in columns]
    names = [token_label(tokenizer, lens.tokens[position]) for position in positions]
    canvas.name_ticks(axes, "x", names, cell[0], positions)
    canvas.name_ticks(axes, "y", [canvas.layer_name(lens.points[end]) for end in ends], cell[1])
    canvas.name_axis(axes, "x", "after reading")
    canvas.name_axis(axes, "y", "layer")
    return image


def _write_words(
    axes: "Axes", image: "AxesImage", lens: LogitLens, tokenizer: Tokenizer, columns: range, cell: tuple[float, float]
) -> None:
    best = lens.top_ids[block_ends(lens.points)][:, columns, 0].numpy()
    known = ~lens.top_probabilities[block_ends(lens.points)][:, columns, 0].isnan().numpy()
    words = [
        [token_label(tokenizer, token, cell[0] * 72) if is_known else "–" for token, is_known in zip(*row, strict=True)]
        for row in zip(best.tolist(), known.tolist(), strict=True)
    ]
    canvas.write_cells(axes, image, words, cell)
    canvas.frame_cells(axes, known & (best == (best[-1] if lens.target is None else lens.target)))


def _lens_words(lens: LogitLens, tokenizer: Tokenizer) -> tuple[str, str]:
    """Title and caption."""
    T = len(lens.positions)
    title, framed = "What each layer would predict next", "if it is the model's final prediction"
    if lens.target is not None:
        title, framed = f"How likely {quoted(tokenizer, lens.target)} is after each layer", "if it is that token"
    parts = f" Above: all {T:,} positions; below: the last {MOST_WORDS}." if T > MOST_WORDS else ""
    how = "Logit lens: the residual stream after each layer, read"
    if lens.is_tuned:
        how = "Tuned lens: the residual stream after each layer, translated by a fitted matrix, then read"
    return title, (
        f"{how} through the final norm and the output matrix."
        f" In the cells: the most likely next token, framed {framed}.{parts}\n{prompt(tokenizer, lens.tokens)}"
    )


# ---- a target


def target_figure(lens: LogitLens, tokenizer: Tokenizer) -> "Figure":
    """Two curves, probability and rank, over the lens's points."""
    from matplotlib.ticker import LogLocator, NullLocator

    followed = lens.followed
    if followed is None:
        raise RequestError("the lens has no target: call logit_lens with target=")
    probability, rank = followed.probability[:, -1].numpy(), followed.rank[:, -1].numpy().astype(float)
    rank[np.isnan(probability)] = np.nan
    target, text = quoted(tokenizer, followed.token), prompt(tokenizer, lens.tokens[: lens.positions[-1] + 1])
    caption = f"Logit lens after the last token.{canvas.hollow(lens.points)}\n{text}"
    figure = canvas.new_figure(7.5, 4.6, f"How {target} becomes likely", caption)
    panels = figure.subplots(2, sharex=True)
    for axes, values, name, color in zip(
        panels,
        (probability, rank),
        (f"probability of {target}", "rank (1: most likely)"),
        (canvas.BLUE, canvas.ORANGE),
        strict=True,
    ):
        axes.set_yscale("log")
        canvas.name_depths(axes, lens.points, figure.get_figwidth())
        canvas.draw_depth(axes, lens.points, values, color)
        canvas.name_axis(axes, "y", name)
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(max(low, LOWEST), min(high, 2))
    panels[1].invert_yaxis()
    panels[1].yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=12))
    panels[1].yaxis.set_minor_locator(NullLocator())
    panels[1].yaxis.set_major_formatter("{x:,g}")
    canvas.name_axis(panels[1], "x", "after layer (E: embedding)")
    return figure
