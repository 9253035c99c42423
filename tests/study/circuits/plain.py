"""The transformer in plain PyTorch, for one text, with a hook at every value that a test may read or replace."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ref.model import Transformer, rope_frequencies, rope_rotations

Hook = Callable[[str, Tensor], Tensor]


def forward(model: Transformer, ids: list[int], hook: Hook = lambda name, value: value, mask: Tensor | None = None) -> Tensor:
    """Logits after the last token: (V,); arguments as those of `all_logits`."""
    return all_logits(model, ids, hook, mask)[-1]


def all_logits(
    model: Transformer, ids: list[int], hook: Hook = lambda name, value: value, mask: Tensor | None = None
) -> Tensor:
    """Logits after every token: (T, V). `mask`, bool (T, T) or (H, T, T), is the attention mask.

    Names: "embedding" (T, D); for each layer "0.q", "0.k", "0.v" (T, heads, hd) before rotation, "0.scores"
    (H, T, T), "0.heads" (T, H, hd), "0.attention" (T, D), "0.mid" (T, D), the stream after it, "0.read"
    (T, D), its norm, "0.hidden" (T, F), "0.ffn" (T, D), "0.post" (T, D).
    """
    w, args, T = model.state_dict(), model.args, len(ids)
    cos, sin = (x[0, :, 0] for x in rope_rotations(torch.arange(T)[None], rope_frequencies(args)))
    mask = torch.ones(T, T, dtype=torch.bool).tril() if mask is None else mask
    x = hook("embedding", F.embedding(torch.tensor(ids), w["tok_embeddings.weight"]))
    for layer in range(args.n_layers):
        own = {key.removeprefix(f"layers.{layer}."): value for key, value in w.items() if key.startswith(f"layers.{layer}.")}
        read = rms(x, own["attention_norm.weight"], args.norm_eps)
        q, k, v = (hook(f"{layer}.{n}", (read @ own[f"attention.w{n}.weight"].T).view(T, -1, args.head_dim)) for n in "qkv")
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        k, v = (part.repeat_interleave(args.n_heads // args.n_kv_heads, 1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / args.head_dim**0.5
        pattern = hook(f"{layer}.scores", scores.masked_fill(~mask, -torch.inf)).softmax(-1)
        heads = hook(f"{layer}.heads", torch.einsum("hqk,khd->qhd", pattern, v))
        x = hook(f"{layer}.mid", x + hook(f"{layer}.attention", heads.flatten(1) @ own["attention.wo.weight"].T))
        read = hook(f"{layer}.read", rms(x, own["ffn_norm.weight"], args.norm_eps))
        hidden = F.silu(read @ own["feed_forward.w1.weight"].T) * (read @ own["feed_forward.w3.weight"].T)
        hidden = hook(f"{layer}.hidden", hidden)
        x = x + hook(f"{layer}.ffn", hidden @ own["feed_forward.w2.weight"].T)
        x = hook(f"{layer}.post", x)
    return rms(x, w["norm.weight"], args.norm_eps) @ w["output.weight"].T


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (T, heads, hd); neighbours are one complex number."""
    turn = torch.complex(cos, sin)[:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
