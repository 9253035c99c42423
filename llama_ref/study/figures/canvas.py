"""Shared by all pictures: figures with title and caption, axes of tokens and layers, heat maps."""

from collections.abc import Iterable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_ref.study.analyses.logit_lens import depth
from llama_ref.study.figures import fonts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D

NARROWEST, WIDEST, TALLEST = 6.0, 22.0, 30.0  # inches
ROWS = 22.0  # inches: the tallest map
TITLE, TEXT, SMALL, CELL = 11, 8, 7, 6.5  # points
PITCH = 0.135  # inches: smallest distance between labels
NUMBERED = 0.3  # inches: narrowest cell that gets a number
EVEN = 0.18  # luminance that contrasts equally with black and white
BAR = 0.13  # inches: width of a colour bar
MOST_CUT = 0.2  # share of labels that may be cut before all are rotated
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "0.35"  # the Okabe-Ito palette, safe for the colour-blind
SHARES, DIFFERENCES, NOTHING = "Blues", "RdBu", "0.85"  # colours for 0 … 1, for -1 … 1, for NaN


def new_figure(width: float, height: float, title: str, caption: str) -> "Figure":
    """A figure with this size in inches for plots, plus a title and a caption (drawable texts)."""
    from matplotlib.figure import Figure

    width = min(max(width, NARROWEST), WIDEST)
    title, caption = (fonts.wrapped(text, 72 * (width - 0.6) / size) for text, size in ((title, TITLE), (caption, TEXT)))
    lines = 1.45 * TITLE * (1 + title.count("\n")) + 1.45 * TEXT * (1 + caption.count("\n"))
    figure = Figure(figsize=(width, min(height + lines / 72, TALLEST)), layout="constrained")
    figure.suptitle(title, fontsize=TITLE, **fonts.style(title))
    figure.supxlabel(caption, fontsize=TEXT, color=GREY, x=0.01, ha="left", **fonts.style(caption))
    return figure


def row_height(wanted: float, n_rows: int) -> float:
    """Inches per row: as wanted, or less if there are very many."""
    return min(wanted, ROWS / n_rows)


def name_axis(axes: "Axes", axis: str, name: str) -> None:
    """Label the x or y axis with a text that may contain tokens."""
    getattr(axes, f"{axis}axis").label.set(text=name, fontsize=TEXT, **fonts.style(name))


def name_ticks(
    axes: "Axes", axis: str, names: Sequence[str], pitch: float, positions: Sequence[int] | None = None, start: int = 0
) -> None:
    """Label as many as fit of the ticks at start, start + 1, …, which are `pitch` inches apart.

    Long names are rotated; a few long names among short ones are cut. If some are left out, the
    others show their token's position, from `positions`.
    """
    step = next(step for n in count() for step in (10**n, 2 * 10**n, 5 * 10**n) if step * pitch >= PITCH)
    if positions is not None and step > 1:
        names = [f"{name}@{position}" for name, position in zip(names, positions, strict=True)]
    shown = names[::step]
    room = 0.92 * pitch * step * 72 / SMALL  # em
    rotated = axis == "x" and sum(fonts.em(name) > room for name in shown) > MOST_CUT * len(shown)
    if axis == "x" and not rotated:
        shown = [fonts.cut(name, room) for name in shown]
    ticks = range(start, start + len(names), step)
    drawn = getattr(axes, f"{axis}axis").set_ticks(ticks, shown, fontsize=SMALL, rotation=90 if rotated else 0)
    for tick, name in zip(drawn, shown, strict=True):
        tick.label1.set(**fonts.style(name))


def name_lines(axes: "Axes", lines: Sequence["Line2D"], names: Sequence[str]) -> None:
    """Add a legend of texts that may contain tokens."""
    legend = axes.legend(lines, names, fontsize=SMALL)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(**fonts.style(name))


# ---- curves over the model's depth


def depths(points: Sequence[str]) -> np.ndarray:
    """Depths, in layers, of points of the residual stream."""
    return np.array([depth(point) for point in points])


def hollow(points: Sequence[str]) -> str:
    """A caption's sentence about the hollow markers of `draw_depth`, if there are any."""
    return " Hollow: between a layer's attention and its feed-forward." if (depths(points) % 1).any() else ""


def layer_name(point: str) -> str:
    """A point's label on an axis of layers."""
    return point.split(".")[1] if "." in point else point


def name_depths(axes: "Axes", points: Sequence[str], width: float) -> None:
    """Label an x axis of layers in a figure of this width, E for the embedding."""
    names = ["E", *map(str, range(int(np.ceil(depth(points[-1]))) + 1))]
    name_ticks(axes, "x", names, (width - 1) / len(names), start=-1)
    axes.grid(alpha=0.25)
    axes.tick_params(which="both", labelsize=SMALL)


def draw_depth(axes: "Axes", points: Sequence[str], values: np.ndarray, color: str) -> "Line2D":
    """Draw a curve over points of the residual stream, with hollow markers within layers."""
    x = depths(points)
    values = np.where(values > 0, values, np.nan) if axes.get_yscale() == "log" else values  # a log axis has no 0
    (line,) = axes.plot(x, values, color=color, linewidth=1, marker="o", markersize=3.5)
    within = x != x.round()
    axes.plot(x[within], values[within], color=color, linestyle="none", marker="o", markersize=3.5, markerfacecolor="white")
    return line


# ---- heat maps


def heat_map(axes: "Axes", values: np.ndarray, norm: "Normalize", colors: str = SHARES) -> "AxesImage":
    """Draw rows × columns as colours, the first row at the bottom; NaN is grey."""
    from matplotlib import colormaps

    image = axes.imshow(values, cmap=colormaps[colors].with_extremes(bad=NOTHING), norm=norm, origin="lower", aspect="auto")
    image.set_interpolation("nearest")
    return image


def color_bar(
    figure: "Figure", image: "AxesImage", axes: Any, name: str, size: tuple[float, float], **options: Any
) -> "Colorbar":
    """Add a colour bar next to one or several axes that together have this size, in inches."""
    bar = figure.colorbar(image, ax=axes, pad=0.1 / size[0], fraction=2 * BAR / size[0], aspect=size[1] / BAR, **options)
    bar.ax.tick_params(labelsize=SMALL)
    bar.ax.yaxis.label.set(text=name, fontsize=TEXT, **fonts.style(name))
    return bar


def write_cells(axes: "Axes", image: "AxesImage", texts: Iterable[Iterable[str]], cell: tuple[float, float]) -> None:
    """Write a text into every cell, cut to the cell's inches, in black or white for contrast."""
    size, values = min(CELL, 0.62 * 72 * cell[1]), image.get_array()
    assert values is not None
    for row, (line, colors) in enumerate(zip(texts, image.to_rgba(values), strict=True)):
        for column, (text, color) in enumerate(zip(line, colors, strict=False)):
            shown = fonts.cut(text, 0.94 * 72 * cell[0] / size)
            luminance = color[:3] ** 2.2 @ (0.2126, 0.7152, 0.0722)
            ink = "black" if luminance > EVEN else "white"
            drawn = axes.text(
                *(column, row, shown), ha="center", va="center_baseline", fontsize=size, color=ink, **fonts.style(shown)
            )
            drawn.set_in_layout(False)  # saves time: there are many, all within the axes


def write_bars(axes: "Axes", values: np.ndarray, pitch: float) -> None:
    """Write each bar's value, if bars `pitch` inches apart have room for it; a dash for NaN."""
    for x, value in enumerate(values):
        text = "–" if np.isnan(value) else f"{value:.2f}" if pitch >= NUMBERED else ""
        axes.text(x, np.nan_to_num(value), text, ha="center", va="bottom", fontsize=CELL)


def percent(share: float) -> str:
    """A share in percent, without the sign; a dash if it is not finite."""
    return str(round(100 * share)) if np.isfinite(share) else "–"


def frame_cells(axes: "Axes", cells: np.ndarray) -> None:
    """Draw a frame around each true cell of (rows, columns)."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    frames = [Rectangle((column - 0.5, row - 0.5), 1, 1) for row, column in np.argwhere(cells)]
    axes.add_collection(PatchCollection(frames, facecolor="none", edgecolor=ORANGE, linewidth=0.9))
