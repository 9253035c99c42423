"""llama.cpp's names for Meta's tensors in a GGUF file; needs no package."""

WITHIN_LAYER = {
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}
OUTSIDE = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}

META_NAMES = {gguf: meta for meta, gguf in (WITHIN_LAYER | OUTSIDE).items()}


def meta_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `layers.3.attention.wq.weight`."""
    *block, part, suffix = name.split(".")
    return ".".join([*(["layers", block[1]] if block else []), META_NAMES[part], suffix])
