"""The loss of each text, which ablations and reconstructions report."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ref.model import Transformer
from llama_ref.study.passes.hooks import read_logits
from llama_ref.study.texts import Batch

POSITIONS = 256  # logits are computed for this many positions at a time


def loss_sums(model: Transformer, batch: Batch, hidden: Tensor, skip: int = 0) -> Tensor:
    """The summed losses of each text's tokens after position `skip`, from the last norm (n, T, D): nats, float32 (n,).

    Every text must have such a token.
    """
    states = torch.cat([own[skip : length - 1] for own, length in zip(hidden, batch.lengths, strict=True)])  # (N, D)
    wanted = torch.cat([own[skip + 1 : length] for own, length in zip(batch.ids, batch.lengths, strict=True)])  # (N,)
    pieces = zip(states.split(POSITIONS), wanted.split(POSITIONS), strict=True)
    losses = torch.cat([F.cross_entropy(read_logits(model, some), own, reduction="none") for some, own in pieces])
    return torch.stack([own.sum() for own in losses.split([length - 1 - skip for length in batch.lengths])])
