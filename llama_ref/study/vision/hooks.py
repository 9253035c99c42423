"""Instrumented forwards of vision.py: the same operations, each value passed through `see` (passes/hooks.py)."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ref.kv_cache import group_mask, grouped_attention
from llama_ref.model import FeedForward
from llama_ref.study.passes.steps import attend_in_steps
from llama_ref.vision import (
    CrossAttention,
    CrossAttentionBlock,
    EncoderAttention,
    EncoderBlock,
    EncoderFeedForward,
    Grid,
    VisionModel,
    VisionTransformer,
)


class Hooks(Protocol):
    """The methods of passes/hooks.py's Attached that these forwards need."""

    def instrument(self, module: nn.Module, forward: Callable[..., Tensor], *where: str) -> None: ...

    def see(self, name: str, value: Tensor) -> Tensor: ...

    def watching_steps(self, where: str) -> Sequence[object]: ...

    def see_shares(self, where: str, added: Tensor, out: Tensor, wo: nn.Module) -> Tensor: ...

    def feed_forward(self, module: FeedForward, where: str, x: Tensor) -> Tensor: ...


class VisionForwards:
    """Instrumented forwards of a model's image encoder and of its cross-attention layers."""

    def __init__(self, hooks: Hooks):
        self.hooks, self.see = hooks, hooks.see

    def install(self, model: VisionTransformer, first_cross_layer: int) -> None:
        instrument, encoder = self.hooks.instrument, model.vision_model.vision_encoder
        instrument(model.vision_model, self.image)
        for name, blocks in (("layers", encoder.transformer), ("global", encoder.global_transformer)):
            for i, block in enumerate(blocks.resblocks):
                where = f"vision.{name}.{i}"
                instrument(block, self.encoder_block, where)
                instrument(block.attn, self.encoder_attention, where)
                instrument(block.mlp, self.encoder_feed_forward, where)
        for i, cross in enumerate(model.cross_attention_layers, first_cross_layer):
            where = f"cross_layers.{i}"
            instrument(cross, self.cross_block, where)
            instrument(cross.feed_forward, self.hooks.feed_forward, where)

    # ---- the encoder

    def image(self, module: VisionModel, tiles: Tensor, grid: Grid) -> Tensor:
        features = self.see("vision.features", module.vision_encoder(tiles, grid)[None])[0]  # (M, C)
        return self.see("vision.tokens", module.vision_projection(features)[None])[0]  # (M, D)

    def encoder_block(self, block: EncoderBlock, where: str, x: Tensor, n_real: int) -> Tensor:
        x = self.see(f"{where}.residual_pre", x)
        added = _gated(block.attn(block.ln_1(x), n_real), block.gate_attn)
        x = self.see(f"{where}.residual_mid", x + self.see(f"{where}.attention.output", added))
        added = _gated(block.mlp(block.ln_2(x)), block.gate_ffn)
        return self.see(f"{where}.residual_post", x + self.see(f"{where}.ffn.output", added))

    def encoder_attention(self, module: EncoderAttention, where: str, x: Tensor, n_real: int) -> Tensor:
        def see(name: str, value: Tensor) -> Tensor:
            return self.see(f"{where}.attention.{name}", value)

        heads = (module.n_heads, -1)
        x = see("norm", x)
        q = see("q", module.wq(x).unflatten(-1, heads)).transpose(1, 2)  # (1, A, E, hd)
        k = see("k", module.wk(x).unflatten(-1, heads)).transpose(1, 2)
        v = see("v", module.wv(x).unflatten(-1, heads)).transpose(1, 2)
        real = F.scaled_dot_product_attention(q[:, :, :n_real], k, v)
        others = F.scaled_dot_product_attention(q[:, :, n_real:], k[:, :, :n_real], v[:, :, :n_real])
        out = torch.cat((real, others), 2).transpose(1, 2)  # (1, E, A, hd)
        watching = self.hooks.watching_steps(where)
        if watching:
            is_real = torch.arange(x.shape[1], device=x.device) < n_real
            visible = (is_real[:, None] | is_real)[None]  # (1, E, E)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            out = attend_in_steps(out, q, k, v, visible, see, in_path=False)
        return module.wo(see("head_output", out).flatten(2))

    def encoder_feed_forward(self, module: EncoderFeedForward, where: str, x: Tensor) -> Tensor:
        up = self.see(f"{where}.ffn.up", module.c_fc(self.see(f"{where}.ffn.norm", x)))
        return module.c_proj(self.see(f"{where}.ffn.hidden", F.gelu(up)))

    # ---- the cross-attention layers

    def cross_block(self, block: CrossAttentionBlock, where: str, x: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        sees = visible.any(-1, keepdim=True)  # (B, T, 1)
        x = self.see(f"{where}.residual_pre", x)
        added = self.cross_attention(block.attention, where, block.attention_norm(x), k, v, visible, sees)
        added = self.see(f"{where}.attention.output", block.gate_attn.tanh() * added * sees)
        x = self.see(f"{where}.residual_mid", x + added)
        added = block.gate_ffwd.tanh() * block.feed_forward(block.ffn_norm(x)) * sees
        return self.see(f"{where}.residual_post", x + self.see(f"{where}.ffn.output", added))

    def cross_attention(
        self, module: CrossAttention, where: str, x: Tensor, k: Tensor, v: Tensor, visible: Tensor, sees: Tensor
    ) -> Tensor:
        """Run cross-attention. Unlike the module's forward, this takes `sees`: which tokens see any image."""

        def see(name: str, value: Tensor) -> Tensor:
            return self.see(f"{where}.attention.{name}", value)

        def see_step(name: str, value: Tensor) -> Tensor:
            """The model lets tokens that see no image attend to all vision tokens; show visitors none."""
            shown = value.masked_fill(~sees[:, None], -torch.inf if name == "scores" else 0)
            found = see(name, shown)
            return value if found is shown else torch.where(sees[:, None], found, value)

        x, k, v = see("norm", x), see("k", k), see("v", v)
        attended = visible | ~sees
        q = see("q", module.q_norm(module.wq(x).unflatten(-1, (-1, module.head_dim))))  # (B, T, H, hd)
        out = grouped_attention(q, k, v, group_mask(attended, q.shape[2] // k.shape[2]))  # (B, T, H, hd)
        if self.hooks.watching_steps(where):
            out = attend_in_steps(out, q, k, v, attended, see_step, in_path=False)
        out = see("head_output", out)
        return self.hooks.see_shares(where, module.wo(out.flatten(-2)), out, module.wo)  # (B, T, D)


def _gated(x: Tensor, gate: nn.Parameter | None) -> Tensor:
    return x if gate is None else gate.tanh() * x
