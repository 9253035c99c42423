"""Resample ablation: replace a part's values by its values at random tokens. Source: Chan et al., "Causal Scrubbing" (2022)."""

import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.numbers import is_whole
from llama_ref.study.names import axes
from llama_ref.study.passes.hooks import Pass
from llama_ref.study.patch import Edit


@dataclass(frozen=True, kw_only=True)
class _Resample(Edit):
    seed: int
    pool: Tensor | None = None  # the tokens' values (n, …) to draw from; None: those of the pass

    def over(self, pool: Tensor) -> Edit:
        return replace(self, pool=pool)

    def changed(self, value: Tensor, name: str, run: Pass | None) -> Tensor:
        if axes(name)[:2] != ("batch", "position"):
            raise RequestError(f"{name} cannot be resampled: it is not one value for each token")
        if run is None:
            raise RequestError(f"{name} is computed here for other tokens than those of a pass: it cannot be resampled")
        pool = self.pool
        if pool is None:
            pool = value.flatten(0, 1) if run.padding is None else value[~run.padding]
        drawn = [self._draw(len(pool), ids) for ids in run.tokens.tolist()]
        return pool.to(value)[torch.tensor(drawn, device="cpu").to(value.device)]

    def _draw(self, n: int, ids: list[int]) -> list[int]:
        """Draw one of n values for each token of a text, independently of the rest of the batch; padding has id -1."""
        own = torch.tensor([id for id in ids if id >= 0], dtype=torch.int64, device="cpu")
        seed = self.seed + zlib.crc32(own.numpy().tobytes())
        chosen = torch.randint(n, (len(own),), generator=torch.Generator("cpu").manual_seed(seed), device="cpu").tolist()
        return chosen + [0] * (len(ids) - len(own))


def resample(seed: int = 0) -> Edit:
    """Replace each token's value by the value at a random token of the pass; in a `sweep`, of all its texts.

    The draws for a text depend only on the seed and the text's ids.
    """
    if not is_whole(seed):
        raise RequestError(f"seed is {seed!r:.40}, expected a whole number")
    if abs(seed) >= 1 << 62:
        raise RequestError(f"seed is {seed!r:.40}, expected a number of at most 62 bits")
    return _Resample(lambda value, name: value, seed=int(seed))
