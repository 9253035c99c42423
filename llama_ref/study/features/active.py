"""Features that fire, as a list: only few of many do."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Active:
    """The nonzero values of `n_tokens` tokens: `tokens` and `features`, int64 (n,), and `values`, float32 (n,).

    They are ordered by token, with the strongest of each token first.
    """

    tokens: Tensor
    features: Tensor
    values: Tensor
    n_tokens: int
    n_features: int

    @classmethod
    def from_triples(cls, tokens: Tensor, features: Tensor, values: Tensor, n_tokens: int, n_features: int) -> "Active":
        """Sort values by token and strength."""
        order = values.abs().argsort(descending=True, stable=True)
        order = order[tokens[order].argsort(stable=True)]
        return cls(tokens[order], features[order], values[order], n_tokens, n_features)

    @classmethod
    def together(cls, parts: Sequence["Active"], starts: Sequence[int]) -> "Active":
        """Join the features of several dictionaries at the same tokens; each dictionary's are numbered from its start."""
        tokens = torch.cat([part.tokens for part in parts])
        features = torch.cat([part.features + start for part, start in zip(parts, starts, strict=True)])
        values = torch.cat([part.values for part in parts])
        return cls.from_triples(tokens, features, values, parts[0].n_tokens, starts[-1] + parts[-1].n_features)

    def dense(self) -> Tensor:
        """All features of every token: float32 (n_tokens, n_features)."""
        out = self.values.new_zeros(self.n_tokens, self.n_features)
        out[self.tokens, self.features] = self.values
        return out

    def columns(self, features: Tensor) -> Tensor:
        """The values of some distinct features (n,) at every token: float32 (n_tokens, n)."""
        found, column = (self.features[:, None] == features).nonzero(as_tuple=True)
        out = self.values.new_zeros(self.n_tokens, len(features))
        out[self.tokens[found], column] = self.values[found]
        return out

    def counts(self) -> Tensor:
        """How many features fire at each token: (n_tokens,)."""
        return torch.bincount(self.tokens, minlength=self.n_tokens)

    def strongest(self, most: int) -> list[tuple[int, int, float]]:
        """(token, feature, value) of the largest values, the largest first."""
        best = self.values.abs().argsort(descending=True, stable=True)[:most]
        parts = (self.tokens[best].tolist(), self.features[best].tolist(), self.values[best].tolist())
        return list(zip(*parts, strict=True))

    def at(self, token: int, most: int | None = None) -> list[tuple[int, float]]:
        """(feature, value) at one token, the strongest first."""
        here = self.tokens == token
        return list(zip(self.features[here].tolist()[:most], self.values[here].tolist()[:most], strict=True))
