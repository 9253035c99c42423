"""Run only some of a model's layers, starting from a given residual stream."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from llama_ref.model import Transformer
from llama_ref.study.passes.hooks import Pass, attached
from llama_ref.study.trace import trace_each


@contextmanager
def layer_window(model: Transformer, layers: range, residual: Tensor) -> Iterator[None]:
    """Limit passes in the block to these layers, followed by the final norm.

    `residual` (B, T, D) replaces the residual stream before the first of them; the pass's ids have
    the same B and T. From layer 3 on: `range(3, n_layers)`. Edits of this stream, also those of outer
    blocks, apply after the replacement.
    """
    with attached(model, _Window(layers, residual), first=True):
        yield


def embedded(model: Transformer, texts: Sequence[Tensor]) -> list[Tensor]:
    """The embeddings (T, D) of texts (T,), with active patches applied; no layer is run."""
    with attached(model, _Window(range(0), None)):
        return [traced["embedding"][0] for traced in trace_each(model, texts, "embedding")]


class _Window:
    """A visitor that sets a pass's layers and its initial residual stream."""

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
