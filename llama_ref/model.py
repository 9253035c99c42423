"""Llama 3 as its report describes it: a decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU.

In the shape comments: B sequences, T new tokens each, S tokens seen so far (the new ones included), D = dim,
H query heads, K key/value heads, hd = head_dim, V = vocab_size. The examples are Llama 3.2 1B's, at 4 sequences of 128 tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ref.args import ModelArgs

# RoPE scaling, section "Llama 3.1" of the model card: waves longer than the context that the model was first trained on are
# slowed by the factor, waves shorter than a quarter of it are kept, those between are blended.
ORIGINAL_CONTEXT = 8192  # tokens
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR = 1, 4


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dimension, in float32, then scale by a learned weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


def rope_frequencies(args: ModelArgs, device: torch.device | None = None) -> Tensor:
    """Radians per position for each pair of a head's dimensions: float32 (hd/2,)."""
    exponents = torch.arange(0, args.head_dim, 2, device=device, dtype=torch.float32) / args.head_dim
    freqs = 1.0 / args.rope_theta**exponents
    if not args.use_scaled_rope:
        return freqs
    wavelengths = 2 * math.pi / freqs
    keep = (ORIGINAL_CONTEXT / wavelengths - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR)
    keep = keep.clamp(0, 1)  # 0: slowed by the whole factor, 1: left as it is
    return (1 - keep) * freqs / args.rope_scaling_factor + keep * freqs


def rope_rotations(positions: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles: positions (B, T) -> two float32 (B, T, 1, hd/2), the same for all heads."""
    angles = positions[:, :, None, None].float() * freqs
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[2i], x[2i+1]) of every head by its position's angle: (B, T, heads, hd) -> the same shape and dtype.

    Meta's weights pair neighbours; Hugging Face's pair x[i] with x[i + hd/2] and permute wq and wk to match.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # 2 × (B, T, heads, hd/2)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).type_as(x)


class KVCache:
    """Keys and values of all tokens seen so far, for every layer, and how far each sequence has come.

    `keys` and `values` are (n_layers, B, K, max_seq_len, hd). `lengths` (B,) counts the tokens that stand in each row; what
    lies beyond is never looked at, so a row is cut back by lowering its length. `longest` is their maximum, known without
    asking the device. For inference: use it under `torch.inference_mode()` or with frozen weights.
    """

    needs_mask = True  # whether its attention makes a mask of new tokens times all tokens

    def __init__(
        self, args: ModelArgs, batch_size: int, max_seq_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ):
        shape = (args.n_layers, batch_size, args.n_kv_heads, max_seq_len, args.head_dim)  # (16, 4, 8, 2048, 64)
        self.keys = torch.empty(shape, dtype=dtype, device=device)  # takes memory only as it fills
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.rows = torch.arange(batch_size, device=device)[:, None]  # (B, 1)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.longest = 0

    @property
    def max_seq_len(self) -> int:
        return self.keys.shape[3]

    def make_room(self, n_tokens: int) -> Tensor:
        """Positions (B, T) of the next `n_tokens` of every row. Raises ValueError when they do not fit."""
        end = self.longest + n_tokens
        if end > self.max_seq_len:
            raise ValueError(f"{self.longest} + {n_tokens} tokens do not fit into a cache of {self.max_seq_len}")
        self.clear_unwritten(n_tokens)
        return self.lengths[:, None] + torch.arange(n_tokens, device=self.lengths.device)

    def clear_unwritten(self, n_tokens: int) -> None:
        """Clear the next `n_tokens` places: shorter rows leave theirs unwritten, and a NaN counts even where it is masked."""
        if len(self.lengths) > 1:
            new = slice(self.longest, self.longest + n_tokens)
            self.keys[:, :, :, new] = self.values[:, :, :, new] = 0

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Store one layer's new k and v (B, T, K, hd) at `positions` (B, T)."""
        # Advanced indices separated by a slice move to the front (NumPy's rule): [(B, 1), :, (B, T)] is (B, T, K, hd).
        self.keys[layer][self.rows, :, positions] = k
        self.values[layer][self.rows, :, positions] = v

    def read(self, layer: int, n_tokens: int) -> tuple[Tensor, Tensor]:
        """One layer's first `n_tokens` keys and values: views (B, S, K, hd) each."""
        return self.keys[layer, :, :, :n_tokens].transpose(1, 2), self.values[layer, :, :, :n_tokens].transpose(1, 2)

    def attend(self, layer: int, q: Tensor, context: "Context") -> Tensor:
        """Attention of the new tokens' q (B, T, H, hd), whose keys and values are written: (B, T, H, hd).

        A subclass may compute it another way, as its device does best.
        """
        k, v = self.read(layer, context.n_seen)  # (B, S, K, hd)
        return attend(q, k, v, context.mask(group=q.shape[2] // k.shape[2]))

    def advance(self, n_tokens: int) -> None:
        self.lengths += n_tokens
        self.longest += n_tokens

    def set_lengths(self, lengths: list[int]) -> None:
        """Cut every row back to its own length, as after a prefill of padded prompts."""
        self.lengths.copy_(torch.tensor(lengths))
        self.longest = max(lengths)


class Context:
    """State shared by all layers of one forward pass: positions, RoPE's cosines and sines, the causal mask, the KV cache."""

    def __init__(self, args: ModelArgs, tokens: Tensor, cache: KVCache | None):
        self.cache = cache
        self.n_new = tokens.shape[1]  # T
        if cache is None:
            self.n_seen = self.n_new  # S, the new tokens included
            self.positions = torch.arange(self.n_new, device=tokens.device)[None]  # (1, T)
        else:
            self.n_seen = cache.longest + self.n_new
            self.positions = cache.make_room(self.n_new)  # (B, T)
        self.rotations = rope_rotations(self.positions, rope_frequencies(args, tokens.device))
        self._mask: Tensor | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of q (B, T, H, hd) over all tokens so far; the new ones' k and v are (B, T, K, hd)."""
        if self.cache is None:
            return attend(q, k, v, mask=None)
        self.cache.write(layer, self.positions, k, v)
        return self.cache.attend(layer, q, self)

    @property
    def visible(self) -> Tensor | None:
        """Which tokens each new one may look at, none later than itself: bool (B, T, S).

        None where the cache was empty: causal attention among the new tokens will do.
        """
        if self.n_seen == self.n_new:
            return None
        keys = torch.arange(self.n_seen, device=self.positions.device)  # (S,)
        return keys <= self.positions[:, :, None]

    def mask(self, group: int) -> Tensor | None:
        """`visible` for G heads that queue up as G·T queries: (B, 1, G·T, S). Made once for all layers."""
        if self._mask is None and (visible := self.visible) is not None:
            B, T, S = visible.shape
            self._mask = visible[:, None].expand(B, group, T, S).reshape(B, 1, group * T, S)
        return self._mask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention: q (B, T, H, hd), k and v (B, S, K, hd) -> (B, T, H, hd).

    Each key head serves G = H/K query heads and is never copied for them: with a mask, the G heads of a group queue up as G·T
    queries of a single head. `mask` (B, 1, G·T, S) is true where a query may look; None means causal with T = S.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T or S, hd)
    if mask is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)
    (B, H, T, hd), K = q.shape, k.shape[1]
    q = q.reshape(B, K, H // K * T, hd)  # (4, 32, 1, 64) -> (4, 8, 4, 64)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.reshape(B, H, T, hd).transpose(1, 2)


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share a key/value head."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_dim = args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x: Tensor, context: Context, layer: int) -> Tensor:
        heads = (-1, self.head_dim)
        q = self.wq(x).unflatten(-1, heads)  # (B, T, H, hd)  (4, 128, 32, 64)
        k = self.wk(x).unflatten(-1, heads)  # (B, T, K, hd)  (4, 128, 8, 64)
        v = self.wv(x).unflatten(-1, heads)  # (B, T, K, hd)
        q, k = rotate(q, *context.rotations), rotate(k, *context.rotations)
        out = context.attend(layer, q, k, v)  # (B, T, H, hd)
        return self.wo(out.flatten(-2))  # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: one projection gates the other."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=False)  # gate
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=False)  # down
        self.w3 = nn.Linear(args.dim, args.ffn_dim, bias=False)  # up

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # (B, T, D) -> (B, T, ffn_dim) -> (B, T, D)


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each on a normed copy of the residual stream and added back to it."""

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
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits for the token after each one: ids (B, T) -> float32 (B, T, V).

        With a cache, every row continues at its own position and the cache grows by T tokens; without, they are the beginning.
        """
        return self.logits(self.hidden(tokens, cache))

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """The last layer's normed output (B, T, D), for callers that need only a few positions' logits."""
        context = Context(self.args, tokens, cache)
        x = self.tok_embeddings(tokens)  # (B, T, D)  (4, 128, 2048)
        for layer, block in enumerate(self.layers):
            x = block(x, context, layer)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, D) -> float32 (…, V)."""
        return self.output(hidden).float()
