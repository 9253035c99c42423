"""The images of a batch's prompts: encoded, and put where the cross-attention layers look for them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ref.decoding.row import Row
from llama_ref.images import Tiles
from llama_ref.kv_cache import ImageKeys, KVCache
from llama_ref.model import Transformer
from llama_ref.onednn import onednn_for
from llama_ref.vision import VisionTransformer

ALWAYS = 1 << 40  # a position after every text's end


def show_images(model: Transformer, rows: list[Row], cache: KVCache, known: int) -> None:
    """Set `cache.images` to those of the rows' prompts, whose first `known` tokens the cache holds already.

    An image within these is not encoded again.
    """
    if not isinstance(model, VisionTransformer):
        return
    before, cache.images = cache.images, None
    if not any(row.images for row in rows):
        return
    seen = [_of_row(model, row, before if known else None, known) for row in rows]
    longest = max(keys.shape[1] for keys, *_ in seen)
    keys, values = (
        torch.stack([F.pad(each[i], (0, 0, 0, 0, 0, longest - each[i].shape[1])) for each in seen], 1) for i in (0, 1)
    )
    places = [F.pad(each[2], (0, longest - each[2].shape[1])) for each in seen]  # the padding's end is 0: nothing sees it
    begins, ends = torch.stack(places, 1).to(keys.device)
    cache.images = ImageKeys(keys, values, begins, ends)


def _of_row(model: VisionTransformer, row: Row, before: ImageKeys | None, known: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (cross layers, N, K, hd) of a row's images, and from where to where each is seen (2, N)."""
    positions = image_positions(row.prompt, model.image_id)
    sizes = [len(image.pixels) * model.args.patches_per_tile for image in row.images]
    n_kept = sum(position < known for position in positions) if before else 0
    parts = [_encoded(model, image) for image in row.images[n_kept:]]
    if before:
        n = sum(sizes[:n_kept])
        parts.insert(0, (before.keys[:, 0, :n], before.values[:, 0, :n]))
    if not parts:
        shape = (len(model.cross_layers), 0, model.args.n_kv_heads, model.args.head_dim)
        parts = [(torch.empty(shape, dtype=model.dtype, device=model.device),) * 2]
    keys, values = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    seen = [torch.tensor(span)[:, None].expand(2, size) for span, size in zip(spans(positions), sizes, strict=True)]
    return keys, values, torch.cat(seen, 1) if seen else torch.empty(2, 0, dtype=torch.long)


def _encoded(model: VisionTransformer, image: Tiles) -> tuple[Tensor, Tensor]:
    """Keys and values (cross layers, N, K, hd) of one image."""
    pixels = image.pixels.to(model.device, model.dtype)
    with onednn_for(pixels, model.dtype):
        tokens = model.vision_model(pixels, image.grid)  # (N, D)
        pairs = [block.attention.keys_and_values(tokens) for block in model.cross_attention_layers]
    if not pairs:  # a pipeline stage without such layers
        nothing = tokens.new_empty(0, len(tokens), model.args.n_kv_heads, model.args.head_dim)
        return nothing, nothing
    keys, values = (torch.stack(each) for each in zip(*pairs, strict=True))
    return keys, values


def image_positions(prompt: list[int], image_id: int) -> list[int]:
    """Where a prompt has its images."""
    return [i for i, token in enumerate(prompt) if token == image_id]


def spans(positions: list[int]) -> list[tuple[int, int]]:
    """From where to before where each image is seen: up to the next one, the last for ever.

    Neighbouring images are all seen up to where the last of them is. Meta's last span ends with the
    prompt if there are several images; here the answer sees the last one too.
    """
    out: list[tuple[int, int]] = []
    end = following = ALWAYS
    for position in reversed(positions):
        if following != position + 1:
            end = following
        out.insert(0, (position, end))
        following = position
    return out
