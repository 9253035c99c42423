"""Pipeline parallelism, put onto a model from outside: each stage holds a run of layers.

The first stage has the embedding, the last the final norm and the output. To its callers a stage's model is a whole
Transformer: where the embedding would be, the state that the stage before sends comes in; where the norm would be, it goes out
to the next; and the last stage's logits reach all. While one stage computes a piece of a long prompt, the stage before it is
at the piece after.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from llama_ref.model import Transformer
from llama_ref.parallel.sharding import Share


def split_layers(model: Transformer, share: Share, group: ProcessGroup) -> None:
    """Make a model that holds one stage's layers take its place among the others; changed in place.

    Every process of the group must call it and every forward pass with the same tokens. All get the logits; what `hidden` gives
    is the last layer's only in the last stage.
    """
    weight = model.layers[0].attention_norm.weight
    like = {"dtype": weight.dtype, "device": weight.device}
    if not share.is_first_stage:
        model.tok_embeddings = ReceivedState(model.args.dim, share.stage - 1, group, **like)
    if not share.is_last_stage:
        model.norm = SentState(share.stage + 1, group)
    output = model.output if share.is_last_stage else None
    model.output = LogitsForAll(output, model.args.vocab_size, group, **like)


class ReceivedState(nn.Module):
    """In place of the embedding: the stream of states that the stage before has computed for the same tokens."""

    def __init__(self, dim: int, source: int, group: ProcessGroup, *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.dim, self.source, self.group, self.like = dim, source, group, {"dtype": dtype, "device": device}

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.empty(*tokens.shape, self.dim, **self.like)  # (B, T, D)
        dist.recv(x, group=self.group, group_src=self.source)
        return x


class SentState(nn.Module):
    """In place of the last norm: hand the state on to the next stage."""

    def __init__(self, target: int, group: ProcessGroup):
        super().__init__()
        self.target, self.group = target, group

    def forward(self, x: Tensor) -> Tensor:
        dist.send(x.contiguous(), group=self.group, group_dst=self.target)
        return x


class LogitsForAll(nn.Module):
    """The last stage's output on every stage: `output` is None on all others."""

    def __init__(
        self, output: nn.Module | None, vocab_size: int, group: ProcessGroup, *, dtype: torch.dtype, device: torch.device
    ):
        super().__init__()
        self.output, self.vocab_size, self.group, self.like = output, vocab_size, group, {"dtype": dtype, "device": device}

    def forward(self, x: Tensor) -> Tensor:
        logits = self.output(x) if self.output else torch.empty(*x.shape[:-1], self.vocab_size, **self.like)
        dist.broadcast(logits, group=self.group, group_src=self.group.size() - 1)
        return logits
