"""Passes through some of a model's layers, from a residual stream that was computed before."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from llama_ref.model import Transformer
from llama_ref.study.hooks import Pass, attached
from llama_ref.study.trace import trace_each


@contextmanager
def layer_window(model: Transformer, layers: range, residual: Tensor) -> Iterator[None]:
    """Passes in the block run these layers alone, then the final norm, and no other layer.

    `residual` (B, T, D) replaces the residual stream before the first of them; the pass's ids have
    the same B and T. From layer 3 on: `range(3, n_layers)`. Edits of it, in blocks around this one
    too, come after.
    """
    with attached(model, _Window(layers, residual), first=True):
        yield


def embedded(model: Transformer, texts: Sequence[Tensor]) -> list[Tensor]:
    """The embeddings (T, D) of texts (T,), as patches around the call leave them: no layer is run."""
    with attached(model, _Window(range(0), None)):
        return [traced["embedding"][0] for traced in trace_each(model, texts, "embedding")]


class _Window:
    """A visitor that sets which layers a pass runs, and what it starts with."""

    edits, in_path = True, False

    def __init__(self, layers: range, residual: Tensor | None):
        self.layers, self.residual = layers, residual
        self.name = f"layers.{layers.start}.residual_pre"

    def wants(self, name: str) -> bool:
        return name == self.name

    def begin(self, run: Pass) -> None:
        run.layers = self.layers

    def visit(self, name: str, value: Tensor, run: Pass | None) -> Tensor:
        return value if self.residual is None else self.residual
