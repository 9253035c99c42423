"""Compress an image and the attention to it for the report: grey pixels, rounded shares, deflate."""

import base64
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from llama_ref.study.vision.image_attention import ImageAttention

LONGEST_SIDE = 480  # pixels of the image on a page
MOST_TOKENS = 128  # a page has the shares of the last tokens that see the image, at most this many


@dataclass(frozen=True)
class PackedImage:
    """An image in grey and the shares of its patches, compressed.

    `positions` are those of the t tokens that have shares. `pixels` is a zlib stream of bytes (height,
    width), `size` is (width, height). `layers[i]` is a zlib stream of bytes (t, rows, columns): 255 times
    the square root of a share divided by the largest share of its token and layer, `largest` (X, t).
    """

    positions: list[int]
    size: tuple[int, int]
    pixels: bytes
    largest: Tensor
    layers: list[bytes]

    def blocks(self) -> Iterator[tuple[str, str]]:
        """Every stream in base64, by the id of its block in the page."""
        yield "image-pixels", base64.b64encode(self.pixels).decode("ascii")
        for layer, packed in enumerate(self.layers):
            yield f"image-layer-{layer}", base64.b64encode(packed).decode("ascii")


def pack_image(found: ImageAttention) -> PackedImage:
    """Compress the attention to an image, and the image itself."""
    positions = found.seen_by[-MOST_TOKENS:]
    patches = found.patches[:, positions]  # (X, t, rows, columns)
    largest = patches.amax((-2, -1))
    parts = (patches / largest.clamp(min=1e-30)[..., None, None]).sqrt()
    rounded = (255 * parts).round().nan_to_num(0).numpy().astype("u1")
    grey = _grey(found.pixels)
    return PackedImage(
        positions,
        (grey.shape[1], grey.shape[0]),
        zlib.compress(grey.tobytes()),
        largest,
        [zlib.compress(x.tobytes()) for x in rounded],
    )


def _grey(pixels: Tensor) -> np.ndarray:
    """Grey bytes (height, width) of an image (height, width, 3), reduced by skipping pixels."""
    step = -(-max(pixels.shape[:2]) // LONGEST_SIDE)
    return pixels[::step, ::step].float().mean(-1).round().numpy().astype("u1")
