"""Resample ablation: a part says what it says elsewhere. Source: Chan et al., "Causal Scrubbing" (2022)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.study.hooks import Pass
from llama_ref.study.names import axes
from llama_ref.study.patch import Edit


@dataclass(frozen=True, kw_only=True)
class _Resample(Edit):
    seed: int
    pool: Tensor | None = None  # values of tokens (n, …); None: those of the pass

    def over(self, pool: Tensor) -> Edit:
        return replace(self, pool=pool)

    def changed(self, value: Tensor, name: str, run: Pass | None) -> Tensor:
        if axes(name)[:2] != ("batch", "position"):
            raise RequestError(f"{name} cannot be resampled: it is not one value for each token")
        pool = self.pool
        if pool is None:
            padding = None if run is None else run.padding
            pool = value.flatten(0, 1) if padding is None else value[~padding]
        generator = torch.Generator("cpu").manual_seed(self.seed)
        chosen = torch.randint(len(pool), value.shape[:2], generator=generator, device="cpu")
        return pool.to(value)[chosen.to(value.device)]


def resample(seed: int = 0) -> Edit:
    """Replace each token's value by that of a random token of the pass; in a `sweep`, of all its texts."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise RequestError(f"seed is {seed!r:.40}, expected a whole number")
    return _Resample(lambda value, name: value, seed=seed)
