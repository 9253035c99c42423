"""Picture of a logit's attribution: shares by layer, their running sum, and the largest shares."""

from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from llama_ref.study.analyses.attribution import Attribution, part_label
from llama_ref.study.figures import canvas
from llama_ref.study.figures.fonts import prompt, quoted
from llama_ref.study.figures.saving import save
from llama_ref.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STRONGEST = 20  # the minimum number of parts shown as bars; more if there are many layers
ROW, BAR = 0.2, 0.42  # inches per layer; a bar's share of its row


def draw_attribution(found: Attribution, tokenizer: Tokenizer, path: str | Path) -> None:
    """Draw each layer's share of a logit, the running sum, and the strongest parts."""
    save(path, attribution_figure, found, tokenizer)


def attribution_figure(found: Attribution, tokenizer: Tokenizer) -> "Figure":
    """Three panels: bars per layer, the running sum, the strongest parts."""
    what, own = f"the logit of {quoted(tokenizer, found.target)}", "the model's own logit is"
    if found.other is not None:
        what = f"how far {quoted(tokenizer, found.target)} is ahead of {quoted(tokenizer, found.other)}"
        own = "the model's own two logits differ by"
    caption = (
        f"Direct logit attribution: the parts add up to {found.total:.2f}; {own} {found.logit:.2f}."
        " Effects through later layers are not included."
        f"\n{prompt(tokenizer, found.tokens[: found.position + 1])}"
    )
    row = canvas.row_height(ROW, len(found.ffns) + 1)
    height = max(2.6, row * (len(found.ffns) + 1)) + 0.6
    figure = canvas.new_figure(11, height, f"What each part of the model adds to {what}", caption)
    layers, so_far, strongest = figure.subplots(1, 3, width_ratios=[5, 2, 4])
    _draw_layers(layers, found)
    _draw_sum(so_far, found)
    _draw_strongest(strongest, found, figure.get_figheight() / 1.4)
    for axes in (layers, so_far):
        axes.set_ylim(-1.6, len(found.ffns) - 0.4)
        canvas.name_ticks(axes, "y", ["E", *map(str, range(len(found.ffns)))], row, start=-1)
    canvas.name_axis(layers, "y", "layer (E: embedding)")
    return figure


def _draw_layers(axes: "Axes", found: Attribution) -> None:
    layers = range(len(found.ffns))
    axes.barh([i + BAR / 2 for i in layers], found.ffns.tolist(), BAR, color=canvas.ORANGE, label="feed-forward")
    axes.barh([i - BAR / 2 for i in layers], found.heads.sum(-1).tolist(), BAR, color=canvas.BLUE, label="attention")
    if found.cross:  # drawn between the layers
        between = [layer - 0.5 for layer in found.cross]
        axes.barh(between, list(found.cross.values()), BAR / 3, color=canvas.GREEN, label="image")
    axes.barh(-1, found.embedding, 2 * BAR, color=canvas.GREY, label="embedding")
    axes.legend(fontsize=canvas.SMALL, loc="best")
    _style_around_zero(axes, "share of the logit" if found.other is None else "share of the difference")


def _draw_sum(axes: "Axes", found: Attribution) -> None:
    shares = (found.heads.double().sum(-1) + found.ffns.double()).tolist()
    layers = [share + found.cross.get(layer, 0) for layer, share in enumerate(shares)]
    sums = list(accumulate(layers, initial=found.embedding))
    axes.plot(sums, range(-1, len(layers)), color="black", marker="o", markersize=3, linewidth=1)
    _style_around_zero(axes, "sum so far")


def _draw_strongest(axes: "Axes", found: Attribution, height: float) -> None:
    n_shown = max(STRONGEST, 2 * len(found.ffns) // 3)
    parts = sorted(found.parts(), key=lambda part: -abs(part[1]))[:n_shown]
    bars = axes.barh(range(len(parts)), [share for _, share in parts], 0.8, color=[_color(name) for name, _ in parts])
    axes.bar_label(bars, fmt="{:+.2f}", fontsize=canvas.SMALL, padding=2)
    axes.margins(x=0.15)
    axes.set_ylim(len(parts) - 0.4, -0.6)
    canvas.name_ticks(axes, "y", [part_label(name) for name, _ in parts], height / len(parts))
    _style_around_zero(axes, f"the {len(parts)} strongest parts")


def _color(name: str) -> str:
    if name.startswith("cross_layers."):
        return canvas.GREEN
    return canvas.BLUE if ".heads." in name else canvas.ORANGE if name.endswith(".ffn") else canvas.GREY


def _style_around_zero(axes: "Axes", name: str) -> None:
    axes.axvline(0, color="black", linewidth=0.6)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=canvas.SMALL)
    canvas.name_axis(axes, "x", name)
