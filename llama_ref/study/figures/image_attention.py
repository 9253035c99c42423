"""Pictures of where tokens look in an image: a panel for each token, or for each layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.study.figures import canvas
from llama_ref.study.figures.fonts import prompt, style, token_label
from llama_ref.study.figures.saving import save
from llama_ref.study.inputs import check_index
from llama_ref.study.vision.image_attention import ImageAttention
from llama_ref.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

MOST_PANELS = 24
COLUMNS = 4
PANEL = 2.3  # inches: the longer side of the image
NARROWEST = 1.5  # inches: a panel's width has room for its title
LABELS = 0.45  # inches above a panel
FADED = 0.45  # share of the image's contrast that is kept under the colours
MOST_PIXELS = 800  # of the drawn image's longer side


def draw_image_attention(found: ImageAttention, tokenizer: Tokenizer, path: str | Path, layer: int | None = None) -> None:
    """Draw where each of the last tokens looks: in one cross-attention layer, or the mean over all."""
    save(path, tokens_figure, found, tokenizer, layer)


def draw_image_layers(found: ImageAttention, tokenizer: Tokenizer, path: str | Path, position: int = -1) -> None:
    """Draw where one token looks in each cross-attention layer, and the mean over all."""
    save(path, layers_figure, found, tokenizer, position)


def tokens_figure(found: ImageAttention, tokenizer: Tokenizer, layer: int | None = None) -> "Figure":
    """One panel for each of the last tokens that see the image: the image, coloured where the token looks."""
    seen_by = found.seen_by
    _check_seen(found, seen_by)
    shown = seen_by[-MOST_PANELS:]
    chosen = slice(None) if layer is None else slice(layer, layer + 1)
    where = "the mean over all cross-attention layers" if layer is None else _layer_name(found, layer)
    panels = []
    for t in shown:
        name = f"{token_label(tokenizer, found.tokens[t])}@{t}"
        panels.append(_Panel(name, *(_mean(each[chosen, t]) for each in (found.patches, found.class_tokens, found.beside))))
    left_out = f" Only the last {MOST_PANELS} of {len(seen_by)} tokens." if len(shown) < len(seen_by) else ""
    return _figure(found, panels, f"Where each token looks: {where}", left_out, tokenizer)


def layers_figure(found: ImageAttention, tokenizer: Tokenizer, position: int = -1) -> "Figure":
    """One panel for each cross-attention layer: the image, coloured where one token looks."""
    position = check_index("position", position, len(found.tokens))
    _check_seen(found, [t for t in found.seen_by if t == position])
    values = [each[:, position] for each in (found.patches, found.class_tokens, found.beside)]
    last = range(max(0, len(found.before) - MOST_PANELS + 1), len(found.before))
    panels = [_Panel("mean over layers", *map(_mean, values))]
    panels += [_Panel(_layer_name(found, layer), *(each[layer] for each in values)) for layer in last]
    left_out = f" Only the last {len(last)} of {len(found.before)} layers." if len(last) < len(found.before) else ""
    title = f"Where {token_label(tokenizer, found.tokens[position])}@{position} looks"
    return _figure(found, panels, title, left_out, tokenizer)


class _Panel(NamedTuple):
    """A panel's name, and its shares of patches (rows, columns), class tokens and patches beside the image."""

    name: str
    patches: Tensor
    class_tokens: Tensor
    beside: Tensor


def _mean(values: Tensor) -> Tensor:
    return values.mean(0)


def _check_seen(found: ImageAttention, seen_by: Sequence[int]) -> None:
    if not seen_by or not found.before:
        raise RequestError("nothing to draw: none of the requested tokens sees the image")


def _layer_name(found: ImageAttention, layer: int) -> str:
    return f"cross layer {layer} (before layer {found.before[layer]})"


def _figure(found: ImageAttention, panels: Sequence[_Panel], title: str, left_out: str, tokenizer: Tokenizer) -> "Figure":
    from matplotlib.colors import PowerNorm

    height, width = found.pixels.shape[:2]
    inch = PANEL / max(height, width)  # inches per pixel
    size = max(inch * width, NARROWEST), inch * height
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    heads = "Mean over all heads." if found.head is None else f"Head {found.head}."
    caption = (
        f"{heads} Blue: share of attention, on a square-root scale, of each patch of 14 × 14 pixels of the image as fitted into"
        f" tiles. Class: share of the tiles’ class tokens, which have no position. Beside: of black patches outside.{left_out}"
        f"\n{prompt(tokenizer, found.tokens)}"
    )
    figure = canvas.new_figure(columns * (size[0] + 0.15) + 1, rows * (size[1] + LABELS), title, caption)
    norm = PowerNorm(0.5, 0, max(float(np.nanmax([panel.patches.max() for panel in panels])), 1e-6))
    grid = figure.subplots(rows, columns, squeeze=False)
    grey = _pale(found.pixels)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, found, grey, panel.patches.numpy(), norm)
        margin = (size[0] / inch - width) / 2
        axes.set(xlim=(-margin, width + margin), ylim=(height, 0))
        text = f"{panel.name}\nclass {_share(panel.class_tokens)}, beside {_share(panel.beside)}"
        axes.set_title(text, fontsize=canvas.SMALL, **style(text))
    for axes in grid.flat:
        axes.set_axis_off()  # the title stays
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_visible(False)  # otherwise the layout spends most of the time measuring its ticks
    image = grid[0, 0].images[-1]
    canvas.color_bar(figure, image, grid, "share of attention", (columns * size[0], rows * size[1]))
    return figure


def _pale(pixels: Tensor) -> np.ndarray:
    """The image in pale grey, with at most MOST_PIXELS pixels on its longer side."""
    step = -(-max(pixels.shape[:2]) // MOST_PIXELS)
    return 1 - FADED * (1 - pixels[::step, ::step].float().mean(-1).numpy() / 255)


def _draw_panel(axes: "Axes", found: ImageAttention, grey: np.ndarray, patches: np.ndarray, norm: "Normalize") -> None:
    """Draw the pale image, and over it a colour that is stronger for larger shares."""
    height, width = found.pixels.shape[:2]
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
    rows, columns = patches.shape
    reach = (0, columns * found.patch_size[0], rows * found.patch_size[1], 0)
    strength = np.clip(np.ma.filled(norm(patches), 0), 0, 1)
    axes.imshow(patches, cmap=canvas.SHARES, norm=norm, alpha=0.8 * strength, extent=reach, interpolation="nearest")


def _share(share: Tensor) -> str:
    return f"{canvas.percent(float(share))}%"
