"""Where in an image each token of a text looks, in the cross-attention layers.

A vision token is a patch of 14 × 14 pixels of the tiles into which an image was fitted, or a tile's
class token, which has no position. Patches are mapped back to the image: the tiles form a canvas with
the resized image at its top left; the rest of the canvas is black.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from llama_ref.args import PATCH_SIZE
from llama_ref.errors import RequestError
from llama_ref.formatting import human_bytes
from llama_ref.images import best_canvas, fitted_size, open_image, tiles_of
from llama_ref.model import Transformer
from llama_ref.parallel.division import whole_args
from llama_ref.study.analyses.attention import LARGEST_LAYER
from llama_ref.study.inputs import check_index, one_row
from llama_ref.study.passes.hooks import check_part
from llama_ref.study.report.packing import watch_patterns
from llama_ref.study.vision.images import check_reads_images
from llama_ref.vision import VisionTransformer

if TYPE_CHECKING:
    from PIL.Image import Image

    from llama_ref.images import ImageFile


@dataclass(frozen=True)
class ImageAttention:
    """Attention of T tokens to one image in X cross-attention layers; float32, on the CPU.

    `patches` (X, T, rows, columns) is the attention to patches that show a part of the image, the first
    at its top left; `class_tokens` (X, T) to the tiles' class tokens; `beside` (X, T) to black patches
    outside the image. They add up to 1, to less where a token sees several images, and to 0 where it does
    not see this one. `before` (X,) is the layer that follows each cross-attention layer. `pixels` uint8
    (height, width, 3) is the image, `patch_size` a patch's width and height in its pixels. `head` is the
    head that was measured; None: the mean over all.
    """

    tokens: list[int]
    before: list[int]
    head: int | None
    pixels: Tensor
    patch_size: tuple[float, float]
    patches: Tensor
    class_tokens: Tensor
    beside: Tensor

    @property
    def seen_by(self) -> list[int]:
        """Positions of the tokens that see the image."""
        total = self.class_tokens + self.beside + self.patches.sum((-2, -1))  # (X, T)
        return total.amax(0).nonzero()[:, 0].tolist()

    def center(self, row: int, column: int) -> tuple[float, float]:
        """The center of a patch in the image: x and y in pixels."""
        width, height = self.patch_size
        most = self.pixels.shape[1], self.pixels.shape[0]  # the last patch may reach beyond the image
        left, top = column * width, row * height
        return (left + min(left + width, most[0])) / 2, (top + min(top + height, most[1])) / 2


@torch.no_grad()
def image_attention(
    model: Transformer, tokens: Sequence[int] | Tensor, images: "Sequence[ImageFile]", *, head: int | None = None
) -> list[ImageAttention]:
    """Measure where each token looks in each image; an image's place is where the ids have `image_id`.

    `head` selects one head of every cross-attention layer; default: the mean over all. Holds one layer's
    patterns at a time. Raises RequestError for a model that cannot read images, a file that is not an
    image, and a number of images that does not match the tokens.
    """
    check_part(model)
    row, model = one_row(model, tokens), check_reads_images(model)
    args = model.args
    assert args.vision_chunk_size is not None
    head = None if head is None else check_index("head", head, args.n_heads)
    pictures = [open_image(image) for image in images]
    tiles = [tiles_of(picture, args.vision_chunk_size, args.vision_max_num_chunks) for picture in pictures]
    sizes = [len(each.pixels) * args.patches_per_tile for each in tiles]
    _check_size(model, row.shape[1], sum(sizes))
    layers: list[Tensor] = []

    def look(pattern: Tensor) -> None:  # (H, T, N)
        layers.append((pattern.mean(0) if head is None else pattern[head]).cpu())

    watch_patterns(model, row, look, tiles, layers="cross_layers")
    found = torch.stack(layers) if layers else torch.zeros(0, row.shape[1], sum(sizes), device="cpu")  # (X, T, N)
    return [
        _of_image(model, row[0].tolist(), head, picture, each.grid, shares)
        for picture, each, shares in zip(pictures, tiles, found.split(sizes, -1), strict=True)
    ]


def _check_size(model: VisionTransformer, n_tokens: int, n_vision_tokens: int) -> None:
    n_bytes = 4 * model.args.n_heads * n_tokens * n_vision_tokens
    if n_bytes > LARGEST_LAYER:
        raise RequestError(
            f"the text has {n_tokens:,} tokens, and every head's attention is a matrix of tokens by {n_vision_tokens:,} vision"
            f" tokens: {human_bytes(n_bytes)} in one layer; shorten the text"
        )


def _of_image(
    model: VisionTransformer, tokens: list[int], head: int | None, picture: "Image", grid: tuple[int, int], shares: Tensor
) -> ImageAttention:
    """Make the ImageAttention of one image from its shares (X, T, vision tokens)."""
    tile = model.args.vision_chunk_size
    assert tile is not None
    by_tile = shares.unflatten(-1, (*grid, -1))  # (X, T, tiles down, tiles across, P)
    side = tile // PATCH_SIZE
    patches = by_tile[..., 1:].unflatten(-1, (side, side))  # (X, T, tiles down, tiles across, side, side)
    canvas = patches.transpose(-3, -2).flatten(-2).flatten(-3, -2)  # (X, T, rows, columns) of the whole canvas
    fitted = fitted_size(picture.size, best_canvas(picture.size, tile, model.args.vision_max_num_chunks), tile)
    columns, rows = (-(-length // PATCH_SIZE) for length in fitted)
    inside = canvas[..., :rows, :columns]
    return ImageAttention(
        tokens=tokens,
        before=whole_args(model).cross_layers,
        head=head,
        pixels=torch.from_numpy(np.array(picture)),
        patch_size=(PATCH_SIZE * picture.width / fitted[0], PATCH_SIZE * picture.height / fitted[1]),
        patches=inside.contiguous(),
        class_tokens=by_tile[..., 0].sum((-2, -1)),
        beside=canvas[..., rows:, :].sum((-2, -1)) + canvas[..., :rows, columns:].sum((-2, -1)),
    )
