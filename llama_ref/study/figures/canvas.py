"""What all pictures share: the sheet, its title and caption, axes of tokens and of layers, maps of numbers."""

from collections.abc import Iterable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_ref.study.figures import fonts
from llama_ref.study.logit_lens import depth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D

NARROWEST, WIDEST, TALLEST = 6.0, 22.0, 30.0  # inches
ROWS = 22.0  # inches of all rows of a map together, at most
TITLE, TEXT, SMALL, CELL = 11, 8, 7, 6.5  # points
PITCH = 0.135  # inches from one label to the next, at least
NUMBERED = 0.3  # inches that a cell with a number has at least
EVEN = 0.18  # luminance that is as far from black as from white
BAR = 0.13  # inches: a colour bar's width
MOST_CUT = 0.2  # of labels, before all are turned
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "0.35"  # Okabe and Ito's, which the colour-blind tell apart
SHARES, DIFFERENCES, NOTHING = "Blues", "RdBu", "0.85"  # colours of 0 … 1, of -1 … 1, of NaN


def new_figure(width: float, height: float, title: str, caption: str) -> "Figure":
    """A sheet of this many inches for what is drawn, with a drawable title above and a caption below."""
    from matplotlib.figure import Figure

    width = min(max(width, NARROWEST), WIDEST)
    title, caption = (fonts.wrapped(text, 72 * (width - 0.6) / size) for text, size in ((title, TITLE), (caption, TEXT)))
    lines = 1.45 * TITLE * (1 + title.count("\n")) + 1.45 * TEXT * (1 + caption.count("\n"))
    figure = Figure(figsize=(width, min(height + lines / 72, TALLEST)), layout="constrained")
    figure.suptitle(title, fontsize=TITLE, **fonts.style(title))
    figure.supxlabel(caption, fontsize=TEXT, color=GREY, x=0.01, ha="left", **fonts.style(caption))
    return figure


def row_height(wanted: float, n_rows: int) -> float:
    """Inches of each row, less than wanted where there are very many."""
    return min(wanted, ROWS / n_rows)


def name_axis(axes: "Axes", axis: str, name: str) -> None:
    """Say what the x or y axis shows, in a text that may hold tokens."""
    getattr(axes, f"{axis}axis").label.set(text=name, fontsize=TEXT, **fonts.style(name))


def name_ticks(
    axes: "Axes", axis: str, names: Sequence[str], pitch: float, positions: Sequence[int] | None = None, start: int = 0
) -> None:
    """Names at start, start + 1, …, which are `pitch` inches apart: as many as there is room for, turned if they are long.

    A few long ones among short ones are cut. Where some are left out, tokens' `positions` are told with the others.
    """
    step = next(step for n in count() for step in (10**n, 2 * 10**n, 5 * 10**n) if step * pitch >= PITCH)
    if positions is not None and step > 1:
        names = [f"{name}@{position}" for name, position in zip(names, positions, strict=True)]
    shown = names[::step]
    room = 0.92 * pitch * step * 72 / SMALL  # em
    lie = axis == "x" and sum(fonts.em(name) > room for name in shown) > MOST_CUT * len(shown)
    if axis == "x" and not lie:
        shown = [fonts.cut(name, room) for name in shown]
    places = range(start, start + len(names), step)
    drawn = getattr(axes, f"{axis}axis").set_ticks(places, shown, fontsize=SMALL, rotation=90 if lie else 0)
    for tick, name in zip(drawn, shown, strict=True):
        tick.label1.set(**fonts.style(name))


def name_lines(axes: "Axes", lines: Sequence["Line2D"], names: Sequence[str]) -> None:
    """A legend of texts that may hold tokens."""
    legend = axes.legend(lines, names, fontsize=SMALL)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(**fonts.style(name))


# ---- curves over the model's depth


def depths(points: Sequence[str]) -> np.ndarray:
    """Where points of the residual stream stand, in layers."""
    return np.array([depth(point) for point in points])


def hollow(points: Sequence[str]) -> str:
    """A sentence for the caption on what `draw_depth` draws hollow, if it does."""
    return " Hollow: between a layer's attention and its feed-forward." if (depths(points) % 1).any() else ""


def layer_name(point: str) -> str:
    """What a point is called beside an axis of layers."""
    return point.split(".")[1] if "." in point else point


def name_depths(axes: "Axes", points: Sequence[str]) -> None:
    """An axis of layers below curves, E for the embedding."""
    names = ["E", *map(str, range(int(np.ceil(depth(points[-1]))) + 1))]
    name_ticks(axes, "x", names, (axes.figure.get_figwidth() - 1) / len(names), start=-1)
    axes.grid(alpha=0.25)
    axes.tick_params(which="both", labelsize=SMALL)


def draw_depth(axes: "Axes", points: Sequence[str], values: np.ndarray, color: str) -> "Line2D":
    """A curve over points of the residual stream, those within layers hollow; a logarithmic axis has no place for 0."""
    x = depths(points)
    values = np.where(values > 0, values, np.nan) if axes.get_yscale() == "log" else values
    (line,) = axes.plot(x, values, color=color, linewidth=1, marker="o", markersize=3.5)
    within = x != x.round()
    axes.plot(x[within], values[within], color=color, linestyle="none", marker="o", markersize=3.5, markerfacecolor="white")
    return line


# ---- a map of numbers


def heat_map(axes: "Axes", values: np.ndarray, norm: "Normalize", colors: str = SHARES) -> "AxesImage":
    """Rows × columns as colours, the first row at the bottom; grey where there is no number."""
    from matplotlib import colormaps

    image = axes.imshow(values, cmap=colormaps[colors].with_extremes(bad=NOTHING), norm=norm, origin="lower", aspect="auto")
    image.set_interpolation("nearest")
    return image


def color_bar(
    figure: "Figure", image: "AxesImage", axes: Any, name: str, size: tuple[float, float], **options: Any
) -> "Colorbar":
    """Which colour is which number, beside one or several axes that have this size together, in inches."""
    bar = figure.colorbar(image, ax=axes, pad=0.1 / size[0], fraction=2 * BAR / size[0], aspect=size[1] / BAR, **options)
    bar.ax.tick_params(labelsize=SMALL)
    bar.ax.yaxis.label.set(text=name, fontsize=TEXT, **fonts.style(name))
    return bar


def write_cells(axes: "Axes", image: "AxesImage", texts: Iterable[Iterable[str]], cell: tuple[float, float]) -> None:
    """A text in every cell of so many inches, cut to it, in black or white as the colour wants."""
    size = min(CELL, 0.62 * 72 * cell[1])
    for row, (line, colors) in enumerate(zip(texts, image.to_rgba(image.get_array()), strict=True)):
        for column, (text, color) in enumerate(zip(line, colors, strict=False)):
            shown = fonts.cut(text, 0.94 * 72 * cell[0] / size)
            luminance = color[:3] ** 2.2 @ (0.2126, 0.7152, 0.0722)
            ink = "black" if luminance > EVEN else "white"
            drawn = axes.text(
                *(column, row, shown), ha="center", va="center_baseline", fontsize=size, color=ink, **fonts.style(shown)
            )
            drawn.set_in_layout(False)  # they are within the axes, and there are many


def write_bars(axes: "Axes", values: np.ndarray, pitch: float) -> None:
    """A number on each bar, where they are `pitch` inches apart and have room; a dash where there is none."""
    for x, value in enumerate(values):
        text = "–" if np.isnan(value) else f"{value:.2f}" if pitch >= NUMBERED else ""
        axes.text(x, np.nan_to_num(value), text, ha="center", va="bottom", fontsize=CELL)


def percent(share: float) -> str:
    """A share as a cell has it."""
    return str(round(100 * share)) if np.isfinite(share) else "–"


def frame_cells(axes: "Axes", cells: np.ndarray) -> None:
    """A frame around each cell (rows × columns) that is true."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    frames = [Rectangle((column - 0.5, row - 0.5), 1, 1) for row, column in np.argwhere(cells)]
    axes.add_collection(PatchCollection(frames, facecolor="none", edgecolor=ORANGE, linewidth=0.9))
