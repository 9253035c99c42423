"""What `llama-ref attention --image` prints."""

import json
from typing import Any

from rich.text import Text
from torch import Tensor

from llama_ref.cli.terminal import print_rich
from llama_ref.cli.views.study.shared import cut, elastic, new_table, percent, plain, prompt, say, tokens_json
from llama_ref.study.inputs import label
from llama_ref.study.vision.image_attention import ImageAttention
from llama_ref.tokenizer import Tokenizer

LOOKED_AT = 4  # patches shown per token


def print_image_attention(found: ImageAttention, tokenizer: Tokenizer, layer: int | None, *, as_json: bool) -> None:
    """Print where each token looks most, in one layer or on average; as JSON, all patches."""
    if as_json:
        print(json.dumps(_as_json(found, tokenizer, layer), indent=2))
        return
    layers = slice(None) if layer is None else slice(layer, layer + 1)
    patches, class_tokens, beside = (x[layers].mean(0) for x in (found.patches, found.class_tokens, found.beside))
    print_rich(prompt(found.tokens, tokenizer))
    height, width = found.pixels.shape[:2]
    where = "mean over the cross-attention layers" if layer is None else f"cross-attention layer {layer}"
    heads = "mean over the heads" if found.head is None else f"head {found.head}"
    print_rich(Text(f"image of {width} × {height} pixels; {where}, {heads}"))
    table = new_table("from", "class", "beside")
    table.add_column("looks at")
    for t in found.seen_by:
        name = f"{cut(label(tokenizer, found.tokens[t]))}@{t}"
        table.add_row(Text(name), percent(class_tokens[t]), percent(beside[t]), elastic(_most(found, patches[t])))
    print_rich(table)
    wide, high = found.patch_size
    say(
        f"Looks at: centers of patches, x and y in pixels; a patch is {wide:.3g} × {high:.3g} pixels of the image. Class: the"
        " tiles' class tokens, which have no position. Beside: black patches beside the image."
    )
    if layer is None:
        before = ", ".join(map(str, found.before))
        say(f"The cross-attention layers come before layers {before}. --layer (from 0) shows one of them, --head one head.")


def _most(found: ImageAttention, patches: Tensor) -> str:
    """Format the patches that are looked at most; `patches` is (rows, columns)."""
    most = patches.flatten().topk(min(LOOKED_AT, patches.numel()))
    cells = []
    for i, share in zip(most.indices.tolist(), most.values.tolist(), strict=True):
        x, y = found.center(*divmod(i, patches.shape[1]))
        cells.append(f"({x:.0f}, {y:.0f}) {percent(share)}")
    return "  ".join(cells)


def _as_json(found: ImageAttention, tokenizer: Tokenizer, layer: int | None) -> dict[str, Any]:
    height, width = found.pixels.shape[:2]
    layers = range(len(found.before)) if layer is None else [layer]
    return {
        "tokens": tokens_json(found.tokens, tokenizer),
        "head": found.head,
        "image": {"width": width, "height": height, "patch_width": found.patch_size[0], "patch_height": found.patch_size[1]},
        "layers": [
            {
                "layer": i,
                "before": found.before[i],
                "class": plain(found.class_tokens[i]),
                "beside": plain(found.beside[i]),
                "patches": plain(found.patches[i]),
            }
            for i in layers
        ],
    }
