"""RoPE's waves: how far each pair of a head's dimensions turns per token, before and after Llama 3.1's scaling."""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.model import rope_frequencies


@dataclass(frozen=True)
class RopeWaves:
    """Every pair's wave, (hd/2,) each: radians per token, and tokens per full turn, as first trained and as the model has them.

    `slowed` says by what each wave is slowed: 1 for short ones, which tell neighbours apart, the whole factor for those longer
    than the context of the first training; all 1 in a model without scaling.
    """

    unscaled: Tensor
    frequencies: Tensor

    @property
    def unscaled_wavelengths(self) -> Tensor:
        return 2 * math.pi / self.unscaled

    @property
    def wavelengths(self) -> Tensor:
        return 2 * math.pi / self.frequencies

    @property
    def slowed(self) -> Tensor:
        return self.unscaled / self.frequencies


def rope_waves(args: ModelArgs) -> RopeWaves:
    """The waves of a model of this shape; no weights are needed."""
    unscaled = replace(args, use_scaled_rope=False, rope_scaling_factor=1.0)
    return RopeWaves(rope_frequencies(unscaled), rope_frequencies(args))
