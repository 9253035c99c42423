"""RoPE's frequencies and wavelengths, before and after Llama 3.1's scaling."""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.model import rope_frequencies


@dataclass(frozen=True)
class RopeWaves:
    """One wave per pair of a head's dimensions: (hd/2,) each, with and without the model's scaling.

    Frequencies are radians per token, wavelengths tokens per full turn. `slowed` is the ratio of
    the two: 1 for short waves, the whole scaling factor for waves longer than the original context.
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
    """RoPE's waves in a model with these args; needs no weights."""
    unscaled = replace(args, use_scaled_rope=False, rope_scaling_factor=1.0)
    return RopeWaves(rope_frequencies(unscaled), rope_frequencies(args))
