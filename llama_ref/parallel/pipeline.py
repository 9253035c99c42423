"""Pipeline parallelism, applied to a model from outside: each stage holds consecutive layers.

The first stage has the embedding, the last one the final norm and the output. To its callers a
stage's model is a whole Transformer: a module in place of the embedding receives the states of the
previous stage, one in place of the norm sends them to the next, and the last stage broadcasts the
logits. While one stage computes a piece of a long prompt, the previous stage computes the next piece.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from llama_ref.model import Transformer
from llama_ref.modules import replace_module
from llama_ref.parallel.sharding import Share


def split_layers(model: Transformer, share: Share, group: ProcessGroup) -> None:
    """Connect a model that holds one stage's layers to the other stages, in place.

    Every process of the group must call it, and run every forward pass with the same tokens. All
    get the logits; `hidden` returns the last layer's output on the last stage only.
    """
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    if not share.is_first_stage:
        received = ReceivedState(model.args.dim, share.stage - 1, group, like)
        replace_module(model, "tok_embeddings", received)
    if not share.is_last_stage:
        replace_module(model, "norm", SentState(share.stage + 1, group))
    output = model.output if share.is_last_stage else None
    replace_module(model, "output", LogitsForAll(output, model.args.vocab_size, group, like))


class ReceivedState(nn.Module):
    """Replaces the embedding: receives the residual stream (B, T, D) from the previous stage."""

    def __init__(self, dim: int, source: int, group: ProcessGroup, like: Tensor):
        super().__init__()
        self.dim, self.source, self.group, self.like = dim, source, group, like

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.like.new_empty(*tokens.shape, self.dim)  # (B, T, D)
        dist.recv(x, group=self.group, group_src=self.source)
        return x


class SentState(nn.Module):
    """Replaces the final norm: sends the residual stream to the next stage."""

    def __init__(self, target: int, group: ProcessGroup):
        super().__init__()
        self.target, self.group = target, group

    def forward(self, x: Tensor) -> Tensor:
        dist.send(x.contiguous(), group=self.group, group_dst=self.target)
        return x


class LogitsForAll(nn.Module):
    """Replaces the output: broadcasts the last stage's logits.

    `output` is None on all other stages.
    """

    def __init__(self, output: nn.Module | None, vocab_size: int, group: ProcessGroup, like: Tensor):
        super().__init__()
        self.output, self.vocab_size, self.group, self.like = output, vocab_size, group, like

    def forward(self, x: Tensor) -> Tensor:
        logits = self.output(x) if self.output else self.like.new_empty(*x.shape[:-1], self.vocab_size)
        dist.broadcast(logits, group=self.group, group_src=self.group.size() - 1)
        return logits
