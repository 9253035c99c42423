"""What `llama-ref info` prints."""

import json
from collections.abc import Iterator
from dataclasses import asdict

from rich.table import Column, Table

from llama_ref.checkpoint.describe import ModelInfo
from llama_ref.cli.terminal import print_rich
from llama_ref.formatting import human_bytes


def print_info(info: ModelInfo, *, as_json: bool) -> None:
    """Print one checkpoint's numbers: a table, or JSON in bytes and tokens."""
    if as_json:
        print(json.dumps(asdict(info), indent=2))
        return
    table = Table("name", Column("value", overflow="fold"), title=info.name, title_justify="left", show_header=False)
    for name, value in _info_lines(info):
        table.add_row(name, value)
    print_rich(table)


def _info_lines(info: ModelInfo) -> Iterator[tuple[str, str]]:
    yield "folder", info.path
    yield "parameters", f"{info.parameters:,}" + (" (output tied to the embedding)" if info.tied_output else "")
    yield "layers", f"{info.n_layers} of width {info.dim:,}"
    yield "attention", f"{info.n_heads} query heads, {info.n_kv_heads} key/value heads, {info.head_dim} wide"
    yield "feed-forward", f"{info.ffn_dim:,} wide"
    yield "vocabulary", f"{info.vocab_size:,} tokens"
    scaling = f", frequencies scaled by {info.rope_scaling_factor:g}" if info.rope_scaling_factor != 1 else ""
    yield "RoPE", f"theta {info.rope_theta:,.0f}{scaling}"
    if info.vision:
        vision = info.vision
        encoder = f"{vision.encoder_layers} layers, {vision.encoder_parameters:,} parameters"
        yield "vision encoder", f"{encoder}, up to {vision.tiles} tiles of {vision.tile} × {vision.tile} pixels"
        yield "cross-attention", f"{vision.cross_attention_layers} additional layers"
    yield "files", f"{info.shards} shard{'s' if info.shards != 1 else ''}, {human_bytes(info.shard_bytes)}"
    yield "checklist", "yes" if info.checklist else "none (the files' contents cannot be checked)"
    if info.foreign_chat_template:
        yield "chat template", "not Llama 3's, so it is ignored: chat uses Llama 3's format"
    yield "weights in memory", ", ".join(f"{human_bytes(size)} in {dtype}" for dtype, size in info.weight_bytes.items())
    contexts = (f"{human_bytes(size)} at {tokens:,} tokens" for tokens, size in info.kv_cache_bytes.items())
    yield "KV cache, 1 sequence", "\n".join(contexts)
    if info.vision:
        yield "per image", f"{human_bytes(info.vision.image_bytes)} more, for {info.vision.tiles} tiles"
