"""Tensor parallelism, applied to a model from outside: several processes each hold a part of every matrix.

Each process has some heads, some feed-forward features and some of the vocabulary (sharding.py says which). Attention
and feed-forward run as they are on the part at hand; their last matrix gives a share of a sum, which one all-reduce completes.
The embedding looks up what it has and sums likewise; the output gathers everybody's logits. Megatron-LM, arXiv:1909.08053.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from llama_ref.model import Transformer
from llama_ref.parallel.sharding import Share


def split_matrices(model: Transformer, share: Share, group: ProcessGroup) -> None:
    """Make a model that holds one `share` of every matrix compute what the whole one would; changed in place.

    Every process of the group must call it and every forward pass with the same tokens. Logits are the same, to the bit, on all
    of them.
    """
    for layer in model.layers:
        layer.attention.wo = RowParallelLinear(layer.attention.wo, group)
        layer.feed_forward.w2 = RowParallelLinear(layer.feed_forward.w2, group)
    vocabulary = model.args.vocab_size
    model.tok_embeddings = VocabParallelEmbedding(model.tok_embeddings, share.of(vocabulary), group)
    model.output = ColumnParallelLinear(model.output, vocabulary, group)


def agreeing(sample: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A sampler whose choice is the first process's on all of them: no rounding can make texts part."""

    def agreed(logits: Tensor) -> Tensor:
        chosen = sample(logits)
        dist.broadcast(chosen, src=0)
        return chosen

    return agreed


class RowParallelLinear(nn.Module):
    """A linear layer whose weight (out, in) is split along its inputs: one all-reduce adds up the partial products."""

    def __init__(self, linear: nn.Module, group: ProcessGroup):
        super().__init__()
        self.linear = linear  # (out, in / W)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x).contiguous()
        dist.all_reduce(out, group=self.group)
        return out


class VocabParallelEmbedding(nn.Module):
    """An embedding split along the vocabulary: other processes' tokens give zeros, and one all-reduce adds up."""

    def __init__(self, embedding: nn.Module, vocabulary: range, group: ProcessGroup):
        super().__init__()
        self.embedding = embedding  # (V / W, D)
        self.vocabulary = vocabulary
        self.group = group

    def forward(self, tokens: Tensor) -> Tensor:
        elsewhere = (tokens < self.vocabulary.start) | (tokens >= self.vocabulary.stop)
        local = (tokens - self.vocabulary.start).masked_fill(elsewhere, 0)
        out = self.embedding(local).masked_fill(elsewhere[..., None], 0)
        dist.all_reduce(out, group=self.group)
        return out


class ColumnParallelLinear(nn.Module):
    """A linear layer whose weight (out, in) is split along its outputs: one all-gather puts them together everywhere."""

    def __init__(self, linear: nn.Module, n_outputs: int, group: ProcessGroup):
        super().__init__()
        self.linear = linear  # (V / W, D)
        self.group = group
        world_size = group.size()
        self.sizes = [len(Share(rank, world_size).of(n_outputs)) for rank in range(world_size)]

    def forward(self, x: Tensor) -> Tensor:
        local = self.linear(x)  # (…, V / W)
        local = F.pad(local, (0, max(self.sizes) - local.shape[-1]))  # all parts must be equally long on the way
        parts = [torch.empty_like(local) for _ in self.sizes]
        dist.all_gather(parts, local, group=self.group)
        return torch.cat([part[..., :size] for part, size in zip(parts, self.sizes, strict=True)], dim=-1)
