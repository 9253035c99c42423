"""Llama 3 (arXiv:2407.21783, section 3.2): RMSNorm, RoPE, grouped-query attention, SwiGLU.

| release     | D      | layers | H   | K | ffn_dim | output     | parameters |
|-------------|--------|--------|-----|---|---------|------------|------------|
| 3.2 1B      | 2,048  | 16     | 32  | 8 | 8,192   | tied       | 1.24 B     |
| 3.2 3B      | 3,072  | 28     | 24  | 8 | 8,192   | tied       | 3.21 B     |
| 3, 3.1 8B   | 4,096  | 32     | 32  | 8 | 14,336  | separate   | 8.03 B     |
| 3 – 3.3 70B | 8,192  | 80     | 64  | 8 | 28,672  | separate   | 70.6 B     |
| 3.1 405B    | 16,384 | 126    | 128 | 8 | 53,248  | separate   | 406 B      |

A tied output shares the embedding's matrix.

In the shape comments: B sequences, T new tokens each, S tokens so far (the new ones included),
D = dim, H query heads, K key/value heads, hd = head_dim, V = vocab_size. Example shapes are for
Llama 3.2 1B and 4 sequences of 128 tokens: prefill (4, 128, …), then decode steps (4, 1, …).
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ref.args import HIGH_FREQ_FACTOR, LOW_FREQ_FACTOR, ORIGINAL_CONTEXT, ModelArgs


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square over the last dimension, in float32, then scale: (…, D) -> (…, D)."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return normed.type_as(x) * weight


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight (arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rope_frequencies(args: ModelArgs, device: torch.device | None = None) -> Tensor:
    """Radians per position for each pair of a head's dimensions: float32 (hd/2,).

    From Llama 3.1 on, low frequencies are divided by a factor, as in `apply_scaling` of Meta's
    llama-models; no model card describes it.
    """
    exponents = torch.arange(0, args.head_dim, 2, device=device, dtype=torch.float32) / args.head_dim
    freqs = 1.0 / args.rope_theta**exponents
    if not args.use_scaled_rope:
        return freqs
    wavelengths = 2 * math.pi / freqs
    keep = (ORIGINAL_CONTEXT / wavelengths - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR)
    keep = keep.clamp(0, 1)  # 0: divided by the full factor, 1: unchanged
    return (1 - keep) * freqs / args.rope_scaling_factor + keep * freqs


def rope_rotations(positions: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles: (B, T) -> two float32 (B, T, 1, hd/2)."""
    angles = positions[:, :, None, None].float() * freqs
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[2i], x[2i+1]) of every head by its position's angle: (B, T, heads, hd).

    A pair is a complex number, and e^(i·angle) turns it: x[2i] · cos − x[2i+1] · sin, x[2i] · sin + x[2i+1] · cos.
    Rotary position embedding (arXiv:2104.09864). Meta's weights pair neighbours; Hugging Face pairs
    x[i] with x[i + hd/2] and permutes wq and wk to match.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())  # (B, T, heads, hd/2)
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).type_as(x)


class Cache(Protocol):
    """The interface of a KV cache that a forward pass uses (kv_cache.py implements it)."""

    longest: int  # tokens in the longest row

    def make_room(self, n_tokens: int) -> Tensor:
        """Positions (B, T) of the next `n_tokens` tokens of every row."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, context: "Context") -> Tensor:
        """Store one layer's k and v (B, T, K, hd), attend with q to all tokens: (B, T, H, hd)."""
        ...

    def advance(self, n_tokens: int) -> None:
        """Count the new tokens as stored, after the last layer."""
        ...


class Context:
    """State shared by all layers of one forward pass: positions, RoPE cos and sin, KV cache."""

    def __init__(self, args: ModelArgs, tokens: Tensor, cache: Cache | None):
        self.cache = cache
        self.n_new = tokens.shape[1]  # T
        if cache is None:
            self.n_seen = self.n_new  # S, the new tokens included
            self.positions = torch.arange(self.n_new, device=tokens.device)[None]  # (1, T)
        else:
            self.n_seen = cache.longest + self.n_new
            self.positions = cache.make_room(self.n_new)  # (B, T)
        self.rotations = rope_rotations(self.positions, rope_frequencies(args, tokens.device))

    @property
    def visible(self) -> Tensor | None:
        """The causal mask, True where a new token attends to a key: bool (B, T, S).

        None if there are no earlier tokens: plain causal attention among the new ones suffices.
        """
        if self.n_seen == self.n_new:
            return None
        keys = torch.arange(self.n_seen, device=self.positions.device)  # (S,)
        return keys <= self.positions[:, :, None]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, softmax(q kᵀ / √hd) v: q (B, T, H, hd), k and v (B, T, K, hd) -> (B, T, H, hd).

    Each key head serves the H/K query heads of its group (arXiv:2305.13245).
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, hd)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


class Attention(nn.Module):
    """Causal self-attention; groups of query heads share a key/value head."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_dim = args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x: Tensor, context: Context, layer: int) -> Tensor:
        heads = (-1, self.head_dim)
        q = self.wq(x).unflatten(-1, heads)  # (B, T, H, hd)  prefill (4, 128, 32, 64), decode (4, 1, 32, 64)
        k = self.wk(x).unflatten(-1, heads)  # (B, T, K, hd)  prefill (4, 128, 8, 64), decode (4, 1, 8, 64)
        v = self.wv(x).unflatten(-1, heads)  # (B, T, K, hd)
        q, k = rotate(q, *context.rotations), rotate(k, *context.rotations)
        if context.cache is None:
            out = attend(q, k, v)  # (B, T, H, hd)
        else:
            out = context.cache.attend(layer, q, k, v, context)  # to all S tokens: (B, T, H, hd)
        return self.wo(out.flatten(-2))  # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: one projection gates another (arXiv:2002.05202)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=False)  # gate
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=False)  # down
        self.w3 = nn.Linear(args.dim, args.ffn_dim, bias=False)  # up

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.w1(x)) * self.w3(x)  # (B, T, ffn_dim)  (4, 128, 8192)
        return self.w2(hidden)  # (B, T, D)


class TransformerBlock(nn.Module):
    """Attention, then feed-forward: each reads the normed residual stream and adds to it."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, context: Context, layer: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), context, layer)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """Token ids in, logits out."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        blocks = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))
        self.layers: Sequence[TransformerBlock] = blocks  # type: ignore[assignment]  # typed items
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        # Every shard of a model has this weight, and it is never quantized.
        return self.layers[0].attention_norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].attention_norm.weight.dtype

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits for the token after each one: ids (B, T) -> float32 (B, T, V).

        With a cache, every row continues at its own position and the cache grows by T tokens;
        without one, the tokens are the beginning of the text.
        """
        return self.logits(self.hidden(tokens, cache))

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """The last layer's normed output (B, T, D), for callers that need only a few positions' logits."""
        context = Context(self.args, tokens, cache)
        x = self.embed(tokens)  # (B, T, D)  prefill (4, 128, 2048), decode (4, 1, 2048)
        for layer, block in enumerate(self.layers):
            x = block(x, context, layer)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed token ids: (B, T) -> (B, T, D)."""
        return self.tok_embeddings(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """Project the last layer's normed output to logits: (…, D) -> float32 (…, V)."""
        return self.output(hidden).float()
