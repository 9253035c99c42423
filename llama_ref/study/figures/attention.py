"""Pictures of attention: the scores of all heads, and the pattern of one head."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from llama_ref.study.analyses.attention import REPEATED_TOKENS, AttentionSummary
from llama_ref.study.figures import canvas
from llama_ref.study.figures.fonts import prompt, token_label
from llama_ref.study.figures.saving import save
from llama_ref.study.inputs import check_index
from llama_ref.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = {
    "sink": "sink: to the first token",
    "previous": "previous: to the token before",
    "induction": "induction: to what followed last time",
    "entropy": "entropy of where it looks",
}
FEW_HEADS = 12  # up to this many heads, the four maps are in one row
# In inches:
CELL, MAP = (0.22, 0.19), (7.0, 9.0)  # a head's cell, the largest map
BAR, BARS, ROW, MARGIN = 0.36, 14.0, 1.3, 0.8  # a bar with its gap, the widest row of bars, a row's height, labels
TOKEN, PATTERN = 0.2, (3.6, 11.0)  # a token, the smallest and largest pattern


def draw_attention(summary: AttentionSummary, tokenizer: Tokenizer, path: str | Path, layer: int | None = None) -> None:
    """Draw every head's scores: maps of layers × heads, or bars for the heads of one layer."""
    if layer is None:
        save(path, attention_figure, summary, tokenizer)
    else:
        save(path, layer_figure, summary, tokenizer, layer)


def draw_pattern(pattern: Tensor, tokens: Sequence[int], tokenizer: Tokenizer, layer: int, head: int, path: str | Path) -> None:
    """Draw one head's attention pattern (T, T)."""
    save(path, pattern_figure, pattern, tokens, tokenizer, layer, head)


def attention_figure(summary: AttentionSummary, tokenizer: Tokenizer) -> "Figure":
    """Four maps, one per score; title and frame mark the best head (entropy: the lowest)."""
    from matplotlib.colors import Normalize

    n_layers, H = summary.sink.shape
    columns = 4 if H <= FEW_HEADS else 2
    cell = (min(CELL[0], MAP[0] / H), min(CELL[1], MAP[1] / n_layers))
    size = (max(2.0, H * cell[0]), n_layers * cell[1])
    caption = _caption(summary, tokenizer, range(n_layers), best="Framed", gap="Grey")
    figure = canvas.new_figure(columns * (size[0] + 1), 4 / columns * (size[1] + 0.9), "Where heads look", caption)
    panels = figure.subplots(4 // columns, columns).flat
    for axes, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        values = getattr(summary, measure).numpy()
        most, unit = _scale(summary, measure)
        image = canvas.heat_map(axes, values, Normalize(0, most))
        is_best, found = _best(values, measure)
        canvas.frame_cells(axes, is_best)
        axes.set_title(f"{title}\n{found}", fontsize=canvas.TEXT)
        canvas.name_ticks(axes, "x", list(map(str, range(H))), size[0] / H)
        canvas.name_ticks(axes, "y", list(map(str, range(n_layers))), cell[1])
        canvas.name_axis(axes, "x", "head")
        canvas.name_axis(axes, "y", "layer")
        canvas.color_bar(figure, image, axes, unit, size)
    return figure


def layer_figure(summary: AttentionSummary, tokenizer: Tokenizer, layer: int) -> "Figure":
    """Four rows of bars, one per score; the best head (entropy: the lowest) is orange."""
    n_layers, H = summary.sink.shape
    layer = check_index("layer", layer, n_layers)
    caption = _caption(summary, tokenizer, [layer], best="Orange", gap="–")
    figure = canvas.new_figure(MARGIN + min(H * BAR, BARS), 4 * ROW, f"Where the heads of layer {layer} look", caption)
    pitch = (figure.get_figwidth() - MARGIN) / H
    panels = figure.subplots(4, sharex=True)
    for axes, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        values = getattr(summary, measure)[[layer]].numpy()  # (1, H)
        most, unit = _scale(summary, measure)
        (is_best,), found = _best(values, measure, first_layer=layer)
        axes.bar(range(H), values[0], 0.8, color=np.where(is_best, canvas.ORANGE, canvas.BLUE))
        canvas.write_bars(axes, values[0], pitch)
        axes.set(xlim=(-0.6, H - 0.4), ylim=(0, 1.2 * most))
        axes.tick_params(labelsize=canvas.SMALL)
        axes.set_title(f"{title}; {found}", fontsize=canvas.TEXT)
        canvas.name_ticks(axes, "x", list(map(str, range(H))), pitch)
        canvas.name_axis(axes, "y", unit)
    canvas.name_axis(panels[-1], "x", "head")
    return figure


def _caption(summary: AttentionSummary, tokenizer: Tokenizer, layers: Sequence[int], *, best: str, gap: str) -> str:
    has_gaps = any(getattr(summary, measure)[list(layers)].isnan().any() for measure in MEASURES)
    gaps = f" {gap}: no number; the text is too short, or the model's numbers are not finite." if has_gaps else ""
    return (
        f"Means over the text's tokens; induction: on {REPEATED_TOKENS} random tokens, repeated once. {best}: the head with the"
        f" highest score, or the lowest entropy.{gaps}\n{prompt(tokenizer, summary.tokens)}"
    )


def _scale(summary: AttentionSummary, measure: str) -> tuple[float, str]:
    """A measure's largest possible value, and its unit."""
    if measure == "entropy":
        return max(0.1, float(np.log(len(summary.tokens)))), "nats"
    return 1.0, "share of attention"


def _best(values: np.ndarray, measure: str, first_layer: int = 0) -> tuple[np.ndarray, str]:
    """A mask (layers, H) of the heads with the best score, and a text that names the first."""
    if np.isnan(values).all():
        return np.zeros_like(values, dtype=bool), "no numbers"
    best, word = (np.nanmin(values), "least") if measure == "entropy" else (np.nanmax(values), "most")
    layer, head = np.argwhere(values == best)[0]
    return values == best, f"{word}: layer {first_layer + layer}, head {head}, {best:.2f}"


def pattern_figure(pattern: Tensor, tokens: Sequence[int], tokenizer: Tokenizer, layer: int, head: int) -> "Figure":
    """A map of T × T, the first token at the top left."""
    from matplotlib.colors import PowerNorm

    T = len(tokens)
    side = min(max(T * TOKEN, PATTERN[0]), PATTERN[1])
    is_numbered = side / T >= canvas.NUMBERED
    numbers = " Numbers are percent." if is_numbered else ""
    caption = f"Each row adds up to 1. The colour scale is a square root, which makes small shares visible.{numbers}"
    figure = canvas.new_figure(side + 2.0, side + 1.2, f"Where layer {layer}, head {head} looks", caption)
    axes = figure.subplots()
    image = canvas.heat_map(axes, pattern.numpy(), PowerNorm(0.5, 0, 1))
    axes.invert_yaxis()
    if is_numbered:
        shares = [
            ["" if share < 0.005 else canvas.percent(share) for share in row[: t + 1]] for t, row in enumerate(pattern.tolist())
        ]
        canvas.write_cells(axes, image, shares, (side / T, side / T))
    names = [token_label(tokenizer, token) for token in tokens]
    for axis, name in (("x", "looks at"), ("y", "from")):
        canvas.name_ticks(axes, axis, names, side / T, range(T))
        canvas.name_axis(axes, axis, name)
    canvas.color_bar(figure, image, axes, "share of attention", (side, side), ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    return figure
