"""The residual streams of several texts, which advance through a model layer by layer.

A patch at some layer changes nothing before it, so passes can start at this layer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from llama_ref.model import Transformer
from llama_ref.parallel.division import whole_args
from llama_ref.study.passes.layer_window import embedded, layer_window
from llama_ref.study.passes.pass_size import split_passes
from llama_ref.study.patching.metrics import Metric, measure
from llama_ref.study.texts import Batch
from llama_ref.study.trace import trace


class Streams:
    """The residual stream of each text before `layer`: `values`, (T, D) in the model's dtype.

    `texts` are ids (T,). Passes have at most `pass_tokens` tokens.
    """

    def __init__(self, model: Transformer, texts: Sequence[Tensor], values: list[Tensor], pass_tokens: int):
        self.model, self.texts, self.values, self.pass_tokens = model, texts, values, pass_tokens
        self.layer = 0

    @classmethod
    @torch.no_grad()
    def from_texts(
        cls, model: Transformer, texts: Sequence[Tensor], pass_tokens: int, added: Sequence[Tensor | None] | None = None
    ) -> "Streams":
        """The streams before layer 0: the embeddings of the texts, plus `added` (T, D) where it is given."""
        values = embedded(model, texts)
        pairs = zip(values, added or [None] * len(values), strict=True)
        return cls(model, texts, [x if more is None else (x.float() + more).to(x) for x, more in pairs], pass_tokens)

    def passes(self, chosen: Sequence[int]) -> Iterator[range]:
        """Split the texts with these indices, in their order, into passes."""
        return split_passes([len(self.texts[i]) for i in chosen], self.pass_tokens)

    @contextmanager
    def resumed(self, chosen: Sequence[int]) -> Iterator[Batch]:
        """Yield a batch of the texts with these indices; its passes in the block start at this layer."""
        layers = range(self.layer, whole_args(self.model).n_layers)
        with layer_window(self.model, layers, self.stacked(chosen)):
            yield Batch.from_texts(self.model, [self.texts[i] for i in chosen])

    def stacked(self, chosen: Sequence[int]) -> Tensor:
        """The streams of some texts as a batch (B, T, D), padded with copies of each text's last position."""
        longest = max(len(self.texts[i]) for i in chosen)
        places = torch.arange(longest, device=self.model.device)
        return torch.stack([self.values[i][places.clamp(max=len(self.texts[i]) - 1)] for i in chosen])

    def measure(self, metrics: Sequence[Metric]) -> Tensor:
        """Run the rest of the model, and apply each text's metric: float32 (n,), on the CPU."""
        found = []
        for some in self.passes(range(len(self.texts))):
            with self.resumed(some) as batch:
                found.append(measure(self.model, batch, metrics[some.start : some.stop]))
        return torch.cat(found).cpu()

    def advance(self, name: str | None = None) -> list[Tensor]:
        """Run this layer, and return each text's activation `name` (1, T, …), or [] without a name."""
        after, found = [], []
        keys = [f"layers.{self.layer}.{part}" for part in ("residual_post", *([name] if name else []))]
        for some in self.passes(range(len(self.texts))):
            with layer_window(self.model, range(self.layer, self.layer + 1), self.stacked(some)):
                traced = trace(self.model, [self.texts[i] for i in some], keys)
            rows = [traced.row(i) for i in range(len(some))]
            after += [row[keys[0]][0] for row in rows]
            found += [row[keys[1]] for row in rows] if name else []
        self.values, self.layer = after, self.layer + 1
        return found
