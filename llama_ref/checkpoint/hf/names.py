"""What Hugging Face calls Meta's tensors, and in which order it keeps the rows of queries and keys."""

import re

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


def theirs(name: str) -> str:
    """Hugging Face's name for one of Meta's ("layers.3.attention.wq.weight" -> "model.layers.3.self_attn.q_proj.weight")."""
    match = LAYER.fullmatch(name)
    return f"model.layers.{match[1]}.{WITHIN_LAYER[match[2]]}.weight" if match else OUTSIDE[name]


def is_rotated(name: str) -> bool:
    """Whether RoPE turns what this matrix makes, so that the order of its rows depends on how pairs are chosen."""
    return name.endswith((".wq.weight", ".wk.weight"))


def from_hf_rope(name: str, rows: Tensor, head_dim: int) -> Tensor:
    """Whole heads' rows (n·hd, D) from Hugging Face's order, x[i] paired with x[i + hd/2], to Meta's, x[2i] with x[2i + 1].

    A copy for the matrices that RoPE turns; any other tensor as it is.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2) if is_rotated(name) else rows


def to_hf_rope(name: str, rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `from_hf_rope`."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2) if is_rotated(name) else rows
