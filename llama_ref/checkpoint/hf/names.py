"""Convert Meta's tensor names and RoPE row order to Hugging Face's and back."""

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from llama_ref.args import ModelArgs

if TYPE_CHECKING:
    from torch import Tensor

LAYER = re.compile(r"layers\.(\d+)\.(.+)\.weight")
WITHIN_LAYER = {
    **{f"attention.w{x}": f"self_attn.{x}_proj" for x in "qkvo"},
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTSIDE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

CROSS_LAYER = re.compile(r"cross_attention_layers\.(\d+)\.(.+?)(\.weight)?")
WITHIN_CROSS_LAYER = {name: theirs.replace("self_attn", "cross_attn") for name, theirs in WITHIN_LAYER.items()} | {
    "attention.q_norm": "cross_attn.q_norm",
    "attention.k_norm": "cross_attn.k_norm",
    "gate_attn": "cross_attn_attn_gate",
    "gate_ffwd": "cross_attn_mlp_gate",
}
ENCODER, PROJECTION = "vision_model.vision_encoder.", "vision_model.vision_projection."
ENCODER_BLOCK = re.compile(r"((?:global_)?transformer)\.resblocks\.(\d+)\.(.+?)(\.weight|\.bias)?")
WITHIN_ENCODER_BLOCK = {
    **{f"attn.w{x}": f"self_attn.{x}_proj" for x in "qkvo"},
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "gate_attn": "gate_attn",
    "gate_ffn": "gate_ffn",
}
OUTSIDE_ENCODER_BLOCKS = {
    "class_embedding": "class_embedding",
    "conv1._linear.weight": "patch_embedding.weight",
    "positional_embedding": "gated_positional_embedding.embedding",
    "gated_positional_embedding": "gated_positional_embedding.tile_embedding.weight",
    "gated_positional_embedding_gate": "gated_positional_embedding.gate",
    "pre_tile_pos_embed.embedding": "pre_tile_positional_embedding.embedding.weight",
    "pre_tile_pos_embed.gate": "pre_tile_positional_embedding.gate",
    "post_tile_pos_embed.embedding": "post_tile_positional_embedding.embedding.weight",
    "post_tile_pos_embed.gate": "post_tile_positional_embedding.gate",
    **{f"ln_{x}.{part}": f"layernorm_{x}.{part}" for x in ("pre", "post") for part in ("weight", "bias")},
}
TEXT_MODEL = "language_model."

# The names of a vision model's parts in transformers 4.52 to 4.57, and in all other versions.
OTHER_TEXT_MODEL = "model.language_model."
OTHER_PREFIXES = {
    OTHER_TEXT_MODEL: "language_model.model.",
    "model.vision_model.": "vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}


def hf_name(name: str, args: ModelArgs | None = None) -> str:
    """Hugging Face's name of one of Meta's tensors; a vision model's names need `args`.

    "layers.3.attention.wq.weight" -> "model.layers.3.self_attn.q_proj.weight"
    """
    if args is not None and args.has_vision:
        return _name_in_vision_model(name, args)
    match = LAYER.fullmatch(name)
    return f"model.layers.{match[1]}.{WITHIN_LAYER[match[2]]}.weight" if match else OUTSIDE[name]


def _name_in_vision_model(name: str, args: ModelArgs) -> str:
    if name.startswith(PROJECTION):
        return name.replace(PROJECTION, "multi_modal_projector.")
    if name.startswith(ENCODER):
        return "vision_model." + _name_in_encoder(name.removeprefix(ENCODER))
    if match := LAYER.fullmatch(name):
        return f"{TEXT_MODEL}model.layers.{numbers_of_layers(args)[int(match[1])]}.{WITHIN_LAYER[match[2]]}.weight"
    if match := CROSS_LAYER.fullmatch(name):
        number = numbers_of_cross_layers(args)[int(match[1])]
        return f"{TEXT_MODEL}model.layers.{number}.{WITHIN_CROSS_LAYER[match[2]]}{match[3] or ''}"
    return TEXT_MODEL + OUTSIDE[name.replace("learnable_embedding", "tok_embeddings")]  # both are in one table


def _name_in_encoder(name: str) -> str:
    if match := ENCODER_BLOCK.fullmatch(name):
        return f"{match[1]}.layers.{match[2]}.{WITHIN_ENCODER_BLOCK[match[3]]}{match[4] or ''}"
    return OUTSIDE_ENCODER_BLOCKS[name]


@lru_cache(maxsize=4)  # called for thousands of names of one model
def numbers_of_cross_layers(args: ModelArgs) -> list[int]:
    """Hugging Face's numbers of the cross-attention layers, which it counts together with the others."""
    return [layer + earlier for earlier, layer in enumerate(args.cross_layers)]


@lru_cache(maxsize=4)
def numbers_of_layers(args: ModelArgs) -> list[int]:
    """Hugging Face's numbers of the other layers."""
    cross = set(numbers_of_cross_layers(args))
    return [number for number in range(args.n_layers + len(cross)) if number not in cross]


def usual_name(name: str) -> str:
    """The usual one of the two names that Hugging Face's files may have for a vision tensor."""
    for other, usual in OTHER_PREFIXES.items():
        if name.startswith(other):
            return usual + name.removeprefix(other)
    return name


def is_rotated(name: str) -> bool:
    """Whether RoPE rotates this matrix's output, so that its row order differs between formats."""
    return name.startswith("layers.") and name.endswith((".wq.weight", ".wk.weight"))


def from_hf_rope(name: str, rows: "Tensor", head_dim: int) -> "Tensor":
    """Reorder rows (n·hd, D) of whole heads from Hugging Face's RoPE order to Meta's.

    Hugging Face pairs x[i] with x[i + hd/2], Meta x[2i] with x[2i + 1]. Returns a copy for matrices
    that RoPE rotates, any other tensor unchanged.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2) if is_rotated(name) else rows


def to_hf_rope(name: str, rows: "Tensor", head_dim: int) -> "Tensor":
    """The inverse of `from_hf_rope`."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2) if is_rotated(name) else rows
