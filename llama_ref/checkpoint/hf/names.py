"""Convert Meta's tensor names and RoPE row order to Hugging Face's and back."""

import re
from typing import TYPE_CHECKING

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


def hf_name(name: str) -> str:
    """Hugging Face's name of one of Meta's tensors.

    "layers.3.attention.wq.weight" -> "model.layers.3.self_attn.q_proj.weight"
    """
    match = LAYER.fullmatch(name)
    return f"model.layers.{match[1]}.{WITHIN_LAYER[match[2]]}.weight" if match else OUTSIDE[name]


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
