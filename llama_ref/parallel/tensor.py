"""Tensor parallelism, applied to a model from outside: each process holds a part of every matrix.

Each process has some heads, some feed-forward features and a part of the vocabulary (sharding.py).
Attention and feed-forward run unchanged on their part; one all-reduce sums the partial products of
their last matrix. Each process embeds the tokens of its part of the vocabulary, and an all-reduce
sums the results; the output gathers the logits of all processes. Megatron-LM, arXiv:1909.08053.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from llama_ref.model import Transformer
from llama_ref.modules import replace_module
from llama_ref.parallel.sharding import Share
from llama_ref.quantization.linear import QuantizedMatrix
from llama_ref.vision import VisionTransformer


def split_matrices(model: Transformer, share: Share, group: ProcessGroup) -> None:
    """Connect a model that holds one `share` of every matrix to the other processes, in place.

    It then computes the same as the whole model. Every process of the group must call this, and run
    every forward pass with the same tokens. Logits are bit-identical on all of them.
    """
    layers: list[nn.Module] = [*model.layers]
    if isinstance(model, VisionTransformer):
        layers += model.cross_attention_layers
    for layer in layers:
        replace_module(layer, "attention.wo", RowParallelLinear(layer.get_submodule("attention.wo"), group))
        replace_module(layer, "feed_forward.w2", RowParallelLinear(layer.get_submodule("feed_forward.w2"), group))
    vocabulary = model.args.vocab_size
    embedding = VocabParallelEmbedding(model.tok_embeddings, share.slice_of(vocabulary), group)
    replace_module(model, "tok_embeddings", embedding)
    replace_module(model, "output", ColumnParallelLinear(model.output, vocabulary, group))


def broadcast_choice(chosen: Tensor) -> Tensor:
    """Broadcast the first process's tokens, so that rounding cannot make processes diverge."""
    dist.broadcast(chosen, src=0)
    return chosen


class RowParallelLinear(nn.Module):
    """A linear layer split along its inputs: one all-reduce sums the partial products.

    Meta's int4 and fp8 releases round or rotate all inputs together: their layers first gather the
    inputs of all processes.
    """

    def __init__(self, linear: nn.Module, group: ProcessGroup):
        super().__init__()
        self.linear = linear  # (out, in / W)
        self.group = group
        self.sizes: list[int] | None = None  # number of inputs per process, if they are gathered
        if isinstance(linear, QuantizedMatrix) and linear.takes_whole_input:
            self.sizes = part_sizes(linear.shape[1], group)

    def forward(self, x: Tensor) -> Tensor:
        inputs = x if self.sizes is None else gathered(x, self.sizes, self.group)  # (…, in)
        return self.summed(self.linear(inputs).contiguous())

    def summed(self, part: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        dist.all_reduce(part, group=self.group)
        return part

    def part_of(self, matrix: Tensor) -> Tensor:
        """This process's columns of the linear layer's dequantized matrix (out, in)."""
        if self.sizes is None:
            return matrix
        rank = self.group.rank()
        return matrix.narrow(1, sum(self.sizes[:rank]), self.sizes[rank])


class VocabParallelEmbedding(nn.Module):
    """An embedding split along the vocabulary: an all-reduce sums the processes' outputs."""

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
    """A linear layer split along its outputs: one all-gather concatenates them on every process."""

    def __init__(self, linear: nn.Module, n_outputs: int, group: ProcessGroup):
        super().__init__()
        self.linear = linear  # (V / W, D)
        self.group = group
        self.sizes = part_sizes(n_outputs, group)

    def forward(self, x: Tensor) -> Tensor:
        return gathered(self.linear(x), self.sizes, self.group)  # (…, V / W) -> (…, V)


def part_sizes(total: int, group: ProcessGroup) -> list[int]:
    """The number of features per process, for `total` features."""
    return [len(Share(rank, group.size()).slice_of(total)) for rank in range(group.size())]


def gathered(local: Tensor, sizes: list[int], group: ProcessGroup, dim: int = -1) -> Tensor:
    """Concatenate the parts of all processes along `dim`, which is negative.

    `sizes` are the parts' lengths there.
    """
    padding = [0, 0] * (-1 - dim) + [0, max(sizes) - local.shape[dim]]  # all_gather needs equal sizes
    local = F.pad(local, padding).contiguous()
    parts = [torch.empty_like(local) for _ in sizes]
    dist.all_gather(parts, local, group=group)
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim)
