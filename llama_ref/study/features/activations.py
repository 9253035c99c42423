"""Activation functions of dictionaries: features fire above a threshold, or the k largest at a token."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Threshold:
    """A feature keeps its value where this is above its threshold: ReLU (0), JumpReLU, BatchTopK.

    `least` is one threshold for all features, or (S,). With `by_decoder_norm` the value times the norm of
    the feature's decoder row is compared.
    """

    least: Tensor
    by_decoder_norm: bool = False

    def for_features(self, features: Tensor | slice) -> Tensor:
        """The thresholds of some features."""
        return self.least if self.least.dim() == 0 else self.least[features]


@dataclass(frozen=True)
class TopK:
    """The k largest features at a token fire; negative values only if `signed`."""

    k: int
    signed: bool = False


Activation = Threshold | TopK


def relu() -> Threshold:
    """A feature fires where its value is positive."""
    return Threshold(torch.tensor(0.0, device="cpu"))


@dataclass(frozen=True)
class Scaling:
    """Factors between the model's activations and the dictionary's.

    `into` multiplies the input, `out` the decoder's output. With `by_token`, for autoencoders, each token's
    activation is scaled to length √D instead, and the output is scaled back.
    """

    into: float = 1.0
    out: float = 1.0
    by_token: bool = False

    def factors(self, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(into, out) for float32 activations (…, D): numbers, or (…, 1)."""
        if not self.by_token:
            return self.into, self.out
        length = x.norm(dim=-1, keepdim=True).clamp(min=1e-8) / x.shape[-1] ** 0.5
        return 1 / length, length
