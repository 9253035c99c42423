"""Encode the images of a batch's prompts, for the cross-attention layers to read."""

import logging

import torch
from torch import Tensor

from llama_ref.decoding.row import Row
from llama_ref.images import Tiles
from llama_ref.kv_cache import ImageKeys, KVCache
from llama_ref.machine.onednn import onednn_for
from llama_ref.model import Transformer
from llama_ref.vision import VisionTransformer

ALWAYS = 1 << 40  # a position beyond the end of any text

logger = logging.getLogger(__name__)


def show_images(model: Transformer, rows: list[Row], cache: KVCache, known: int) -> None:
    """Set `cache.images` to the images of the rows' prompts.

    The cache already holds the prompts' first `known` tokens: their images are not encoded again.
    """
    before, cache.images = cache.images, None
    if not isinstance(model, VisionTransformer) or not any(row.images for row in rows):
        return
    sizes = [[len(image.pixels) * model.args.patches_per_tile for image in row.images] for row in rows]
    images = _room(model, len(rows), max(map(sum, sizes)))
    for number, row in enumerate(rows):
        positions = image_positions(row.prompt, model.image_id)
        n_kept = sum(position < known for position in positions) if before else 0
        start = 0
        for i, (image, size, span) in enumerate(zip(row.images, sizes[number], spans(positions), strict=True)):
            place = slice(start, start := start + size)
            images.begins[number, place], images.ends[number, place] = span
            keys, values = images.keys[:, number, place], images.values[:, number, place]
            if before and i < n_kept:
                keys.copy_(before.keys[:, number, place])
                values.copy_(before.values[:, number, place])
            else:
                _encode(model, image, keys, values)
    cache.images = images


def _room(model: VisionTransformer, n_rows: int, n_tokens: int) -> ImageKeys:
    """Zeros, visible to no position: rows with fewer image tokens keep them as padding."""
    shape = (len(model.cross_layers), n_rows, n_tokens, model.args.n_kv_heads, model.args.head_dim)
    keys, values = (torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(2))
    begins, ends = (torch.zeros(n_rows, n_tokens, dtype=torch.long, device=model.device) for _ in range(2))
    return ImageKeys(keys, values, begins, ends)


def _encode(model: VisionTransformer, image: Tiles, keys: Tensor, values: Tensor) -> None:
    """Write one image's keys and values (cross layers, N, K, hd)."""
    if not model.cross_layers:  # a pipeline stage without cross-attention
        return
    logger.info("encoding an image of %d tiles", len(image.pixels))
    pixels = image.pixels.to(model.device, model.dtype)
    with onednn_for(pixels, model.dtype):
        tokens = model.vision_model(pixels, image.grid)  # (N, D)
        for i, block in enumerate(model.cross_attention_layers):
            keys[i], values[i] = block.attention.keys_and_values(tokens)


def image_positions(prompt: list[int], image_id: int) -> list[int]:
    """Positions of the images in a prompt."""
    return [i for i, token in enumerate(prompt) if token == image_id]


def spans(positions: list[int]) -> list[tuple[int, int]]:
    """Positions (begin, end) that see each image: up to the next image; without end for the last.

    Adjacent images share the end of the last of them. Meta's last span ends with the prompt if
    there are several images; here the answer sees the last image too.
    """
    out: list[tuple[int, int]] = []
    end = following = ALWAYS
    for position in reversed(positions):
        if following != position + 1:
            end = following
        out.insert(0, (position, end))
        following = position
    return out
