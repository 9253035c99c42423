"""Llama 3.2 vision (arXiv:2407.21783, section 7): an image encoder and cross-attention layers.

The text model is that of model.py, unchanged. Before about every fourth of its layers, a
cross-attention layer attends to the images' tokens; without images it does nothing.

| release | text model | encoder        | cross-attention layers | tile         |
|---------|------------|----------------|------------------------|--------------|
| 11B     | 8B         | 0.8 B, 40 deep | 8                      | 448² or 560² |
| 90B     | 70B        | 0.8 B, 40 deep | 20                     | 560²         |

In the shape comments: n tiles per image, p patches per tile, P = p + 1 tokens per tile, W =
vision_dim, N vision tokens of a row's images, D, B, T, H, K and hd as in model.py. Example shapes
are for the 11B at 560 pixels and an image of two tiles.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ref.args import N_LEARNABLE, PATCH_SIZE, TOKENS_MULTIPLE, ModelArgs
from llama_ref.kv_cache import ImageKeys, KVCache, group_mask, grouped_attention
from llama_ref.model import Context, FeedForward, RMSNorm, Transformer, TransformerBlock

Grid = tuple[int, int]  # rows and columns of an image's tiles


class Patches(nn.Module):
    """One token per patch of 14 × 14 pixels: a convolution without overlap, as one matrix."""

    def __init__(self, width: int):
        super().__init__()
        self._linear = nn.Linear(3 * PATCH_SIZE**2, width, bias=False)  # inputs: channel, row, column

    def forward(self, tiles: Tensor) -> Tensor:
        patches = tiles.unflatten(3, (-1, PATCH_SIZE)).unflatten(2, (-1, PATCH_SIZE))  # (n, 3, 40, 14, 40, 14)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (n, p, 588)  (2, 1600, 588)
        return self._linear(patches)  # (n, p, W)  (2, 1600, 1280)


class TileEmbedding(nn.Module):
    """A gated embedding of each tile's position in the grid."""

    def __init__(self, n_tiles: int, width: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(n_tiles, n_tiles, 1, width))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, grid: Grid) -> Tensor:
        return self.embedding[: grid[0], : grid[1]].flatten(0, 1) * self.gate.tanh()  # (n, 1, W)


class EncoderAttention(nn.Module):
    """Attention without positions or a causal mask; the first `n_real` tokens are the image's.

    The others are padding and empty tiles. Every token attends to the real ones. The real ones also
    attend to the others, as in Meta's code, whose mask hides padding only from padding.
    """

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, width, bias=False)
        self.wv = nn.Linear(width, width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, n_real: int) -> Tensor:
        heads = (self.n_heads, -1)
        q = self.wq(x).unflatten(-1, heads).transpose(1, 2)  # (1, heads, tokens, W / heads)  (1, 16, 6432, 80)
        k = self.wk(x).unflatten(-1, heads).transpose(1, 2)
        v = self.wv(x).unflatten(-1, heads).transpose(1, 2)
        real = F.scaled_dot_product_attention(q[:, :, :n_real], k, v)
        others = F.scaled_dot_product_attention(q[:, :, n_real:], k[:, :, :n_real], v[:, :, :n_real])
        return self.wo(torch.cat((real, others), 2).transpose(1, 2).flatten(2))  # (1, tokens, W)


class EncoderFeedForward(nn.Module):
    """Two matrices with biases around a GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class EncoderBlock(nn.Module):
    """Attention, then feed-forward, on normed states; gated in the global blocks."""

    def __init__(self, width: int, n_heads: int, is_gated: bool):
        super().__init__()
        self.attn = EncoderAttention(width, n_heads)
        self.mlp = EncoderFeedForward(width)
        self.ln_1 = nn.LayerNorm(width)
        self.ln_2 = nn.LayerNorm(width)
        self.gate_attn = nn.Parameter(torch.zeros(1)) if is_gated else None
        self.gate_ffn = nn.Parameter(torch.zeros(1)) if is_gated else None

    def forward(self, x: Tensor, n_real: int) -> Tensor:
        x = x + _gated(self.attn(self.ln_1(x), n_real), self.gate_attn)
        return x + _gated(self.mlp(self.ln_2(x)), self.gate_ffn)


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else gate.tanh() * x


class EncoderBlocks(nn.Module):
    """A list of blocks, with Meta's parameter names."""

    def __init__(self, args: ModelArgs, n_blocks: int, is_gated: bool):
        super().__init__()
        blocks = nn.ModuleList(EncoderBlock(args.vision_dim, args.vision_n_heads, is_gated) for _ in range(n_blocks))
        self.resblocks: Sequence[EncoderBlock] = blocks  # type: ignore[assignment]  # typed items


class VisionEncoder(nn.Module):
    """Encodes one image's tiles: a vision transformer (arXiv:2010.11929), local and global blocks.

    It always runs on `vision_max_num_chunks` tiles; tiles that the image does not have are empty.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_tiles, self.kept_layers, width = args.vision_max_num_chunks, args.vision_kept_layers, args.vision_dim
        tiles = (self.n_tiles, self.n_tiles, args.patches_per_tile, width)
        self.conv1 = Patches(width)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(args.patches_per_tile, width))
        self.gated_positional_embedding = nn.Parameter(torch.zeros(tiles))
        self.gated_positional_embedding_gate = nn.Parameter(torch.zeros(1))
        self.pre_tile_pos_embed = TileEmbedding(self.n_tiles, width)
        self.post_tile_pos_embed = TileEmbedding(self.n_tiles, width)
        self.ln_pre = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)
        self.transformer = EncoderBlocks(args, args.vision_n_layers, is_gated=False)
        self.global_transformer = EncoderBlocks(args, args.vision_n_global_layers, is_gated=True)

    def forward(self, tiles: Tensor, grid: Grid) -> Tensor:
        """Pixels (n, 3, S, S) of an image whose tiles lie in `grid` -> (n · P, (1 + kept) · W).

        The last block's features come first, then those of the kept states, interleaved by feature.
        """
        x = self.embedded(tiles, grid)  # (n_tiles, P, W)  (4, 1601, 1280)
        n, P = len(tiles), x.shape[1]
        x = F.pad(x, (0, 0, 0, TOKENS_MULTIPLE - P % TOKENS_MULTIPLE))  # (4, 1608, 1280)
        order = _real_first(x, n, P)
        x, n_real = x.flatten(0, 1)[None, order], n * P  # (1, 6432, 1280), 3202 of them real
        kept = []
        for i, block in enumerate(self.transformer.resblocks):
            if i in self.kept_layers:
                kept.append(x[0, :n_real])
            x = block(x, n_real)
        x = self.ln_post(x) + self._places(grid, len(order) // self.n_tiles)[order]
        for block in self.global_transformer.resblocks:
            x = block(x, n_real)
        states = [x[0, :n_real]] + ([torch.stack(kept, -1).flatten(-2)] if kept else [])
        return torch.cat(states, -1)  # (3202, 7680)

    def embedded(self, tiles: Tensor, grid: Grid) -> Tensor:
        """Tokens of all tiles, also empty ones, with position embeddings: (n_tiles, P, W)."""
        n = len(tiles)
        x = self.conv1(tiles) + self.pre_tile_pos_embed(grid)  # (n, p, W)
        x = F.pad(x, (0, 0, 0, 0, 0, self.n_tiles - n))
        x = torch.cat((self.class_embedding.expand(self.n_tiles, 1, -1), x), 1)  # (n_tiles, P, W)
        gate = self.gated_positional_embedding_gate.tanh()
        x = x + self.positional_embedding * (1 - gate)
        in_grid = self.gated_positional_embedding[: grid[0], : grid[1]].flatten(0, 1)  # (n, P, W)
        return self.ln_pre(torch.cat((x[:n] + in_grid * gate, x[n:])))

    def _places(self, grid: Grid, n_tokens: int) -> Tensor:
        """The second tile embedding of every token, 0 for empty tiles: (n_tiles · tokens, W)."""
        places = self.post_tile_pos_embed(grid)  # (n, 1, W)
        places = F.pad(places, (0, 0, 0, 0, 0, self.n_tiles - len(places)))
        return places.expand(-1, n_tokens, -1).flatten(0, 1)


def _real_first(x: Tensor, n: int, P: int) -> Tensor:
    """Indices of all tiles' tokens, ordered so that the first P of the first n tiles come first."""
    numbers = torch.arange(x.shape[0] * x.shape[1], device=x.device).view(x.shape[:2])
    return torch.cat((numbers[:n, :P].flatten(), numbers[:n, P:].flatten(), numbers[n:].flatten()))


class VisionModel(nn.Module):
    """Encoder and projection: turns an image into vision tokens of the text model's width."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.vision_encoder = VisionEncoder(args)
        self.vision_projection = nn.Linear((1 + len(args.vision_kept_layers)) * args.vision_dim, args.dim)

    def forward(self, tiles: Tensor, grid: Grid) -> Tensor:
        """Pixels (n, 3, S, S) -> (n · P, D)."""
        return self.vision_projection(self.vision_encoder(tiles, grid))


class CrossAttention(nn.Module):
    """Text attends to images: normed queries and keys, no positions, heads grouped as in text."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_dim = args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)
        self.q_norm = RMSNorm(args.head_dim, args.norm_eps)
        self.k_norm = RMSNorm(args.head_dim, args.norm_eps)

    def keys_and_values(self, vision_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (N, K, hd) of an image's tokens (N, D), computed once, not per step."""
        heads = (-1, self.head_dim)
        return self.k_norm(self.wk(vision_tokens).unflatten(-1, heads)), self.wv(vision_tokens).unflatten(-1, heads)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        q = self.q_norm(self.wq(x).unflatten(-1, (-1, self.head_dim)))  # (B, T, H, hd)
        mask = group_mask(visible, q.shape[2] // k.shape[2])  # (B, 1, H/K · T, N)
        return self.wo(grouped_attention(q, k, v, mask).flatten(-2))  # (B, T, D)


class CrossAttentionBlock(nn.Module):
    """Cross-attention, then feed-forward, both gated. A token that sees no image is unchanged."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = CrossAttention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.gate_attn = nn.Parameter(torch.zeros(1))
        self.gate_ffwd = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """x (B, T, D); k and v (B, N, K, hd); which tokens see which keys (B, T, N) -> (B, T, D)."""
        sees = visible.any(-1, keepdim=True)  # (B, T, 1)
        # A softmax over nothing is NaN: tokens that see no image attend to all, and are zeroed.
        added = self.attention(self.attention_norm(x), k, v, visible | sees.logical_not())
        x = x + self.gate_attn.tanh() * added * sees
        return x + self.gate_ffwd.tanh() * self.feed_forward(self.ffn_norm(x)) * sees


class VisionTransformer(Transformer):
    """The text model, with cross-attention layers before some of its layers.

    A pass attends to the images of its cache (`KVCache.images`), if there are any. `cross_layers`:
    the layers preceded by a cross-attention layer; default: those of `args`.
    """

    def __init__(self, args: ModelArgs, cross_layers: Sequence[int] | None = None):
        super().__init__(args)
        self.cross_layers = args.cross_layers if cross_layers is None else list(cross_layers)
        blocks = nn.ModuleList(CrossAttentionBlock(args) for _ in self.cross_layers)
        self.cross_attention_layers: Sequence[CrossAttentionBlock] = blocks  # type: ignore[assignment]  # typed items
        self.vision_model = VisionModel(args)
        # Rows for ids after the vocabulary; only the first is used, for the image token.
        self.learnable_embedding: nn.Embedding | None = nn.Embedding(N_LEARNABLE, args.dim)
        for i, layer in enumerate(self.cross_layers):
            self.layers[layer].register_forward_pre_hook(_Before(blocks[i], i))

    @property
    def image_id(self) -> int:
        """The id that marks an image in a prompt: the first after the vocabulary (128256)."""
        return self.args.vocab_size

    def embed(self, tokens: Tensor) -> Tensor:
        if self.learnable_embedding is None:  # a later pipeline stage, which gets states
            return super().embed(tokens)
        is_text = tokens < self.image_id
        text = super().embed(tokens.where(is_text, 0))
        return text.where(is_text.unsqueeze(-1), self.learnable_embedding((tokens - self.image_id).clamp(min=0)))


class _Before:
    """Runs a cross-attention layer before a text layer."""

    def __init__(self, block: nn.Module, index: int):
        self.block, self.index = block, index

    def __call__(self, layer: TransformerBlock, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x, context, *rest = inputs
        images = shown_to(context)
        if images is None:
            return None
        k, v = images.keys[self.index], images.values[self.index]
        return self.block(x, k, v, images.visible(context.positions)), context, *rest


def shown_to(context: Context) -> ImageKeys | None:
    """The images that a pass attends to, or None."""
    return context.cache.images if isinstance(context.cache, KVCache) else None
