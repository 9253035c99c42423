"""The losses of texts, by which ablations and reconstructions are measured."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ref.model import Transformer
from llama_ref.study.texts import Batch

POSITIONS = 256  # whose logits are made at a time


def loss_sums(model: Transformer, batch: Batch, hidden: Tensor, skip: int = 0) -> Tensor:
    """The summed losses of each text's tokens after position `skip`, from the last norm (n, T, D): nats, float32 (n,).

    Every text has such a token.
    """
    found = []
    for ids, length, states in zip(batch.ids, batch.lengths, hidden, strict=True):
        pieces = zip(states[skip : length - 1].split(POSITIONS), ids[skip + 1 : length].split(POSITIONS), strict=True)
        found.append(
            torch.stack([F.cross_entropy(model.logits(some), wanted, reduction="sum") for some, wanted in pieces]).sum()
        )
    return torch.stack(found)
