"""Run circuits of growing size: how much of an answer do a few edges or nodes carry alone?

In a circuit's run every receiver reads the clean text's senders along the circuit's edges, and the
corrupted text's senders along all others. Sources: Wang et al., arXiv:2211.00593; Marks et al.,
arXiv:2403.19647.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.study.circuits.graph import EdgeScores, edge_mask, first_receiver, n_before
from llama_ref.study.circuits.runs import Run, as_runs, head_results, layer_ports, written_names
from llama_ref.study.passes.hooks import check_model
from llama_ref.study.passes.layer_window import layer_window
from llama_ref.study.patch import patch
from llama_ref.study.patching.metrics import Metric, measure
from llama_ref.study.patching.pairs import Corrupted
from llama_ref.study.texts import Batch, Texts


@dataclass(frozen=True)
class CircuitCurve:
    """The metric with only the top `sizes` edges or nodes (`kept`), and with all but these (`removed`).

    `clean` and `corrupted` are the metric with all edges and with none.
    """

    sizes: list[int]
    kept: list[float]
    removed: list[float]
    clean: float
    corrupted: float

    @property
    def faithfulness(self) -> np.ndarray:
        """Share of the texts' difference that the circuit alone keeps: 1 for the whole model."""
        return (np.array(self.kept) - self.corrupted) / (self.clean - self.corrupted or math.nan)

    @property
    def completeness(self) -> np.ndarray:
        """Share of the texts' difference that is lost without the circuit: 1 if no other part carries any."""
        return (self.clean - np.array(self.removed)) / (self.clean - self.corrupted or math.nan)


def circuit_curve(
    model: Transformer,
    clean: Texts,
    corrupted: Corrupted,
    metrics: Metric | Sequence[Metric],
    scores: EdgeScores,
    sizes: Sequence[int],
    *,
    of: Literal["edges", "nodes"] = "edges",
    progress: Progress | None = None,
) -> CircuitCurve:
    """Run the circuits of the top edges or nodes of these `sizes`, and the model without them.

    The embedding is a node too. Arguments are those of `attribute_edges`, whose scores rank the edges
    or nodes. `progress` is called with the circuits done and their number. Raises RequestError.
    """
    if of not in ("edges", "nodes"):
        raise RequestError(f"of is {of!r:.40}, expected edges or nodes")
    if not isinstance(sizes, Sequence) or isinstance(sizes, str) or not sizes:
        raise RequestError(f"sizes is {sizes!r:.40}, expected a list of sizes, such as [10, 100, 1000]")
    top = scores.keep_edges if of == "edges" else scores.keep_nodes
    masks = [top(n) for n in sizes]
    counter = ProgressCounter(2 * len(masks) + 2, progress)

    def run(mask: Tensor) -> float:
        found = run_circuit(model, clean, corrupted, metrics, mask)
        counter.advance()
        return found

    kept, removed = [run(mask) for mask in masks], [run(scores.mask & ~mask) for mask in masks]
    return CircuitCurve([int(n) for n in sizes], kept, removed, run(scores.mask), run(torch.zeros_like(scores.mask)))


@torch.no_grad()
def run_circuit(
    model: Transformer, clean: Texts, corrupted: Corrupted, metrics: Metric | Sequence[Metric], mask: Tensor
) -> float:
    """The metric where only the edges of `mask`, bool (receivers, senders), are clean; a mean over pairs.

    Each receiver's stream and norm are computed separately. Raises RequestError for a mask of another shape.
    """
    check_model(model)
    expected = edge_mask(model.args)
    if not isinstance(mask, Tensor) or mask.shape != expected.shape:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise RequestError(f"mask is {found}, expected a tensor {tuple(expected.shape)} of receivers and senders")
    weights = (mask & expected).to(model.device, torch.float32)
    total = 0.0
    for run in as_runs(model, clean, corrupted, metrics):
        circuit = _Circuit(model, run, weights)
        layers = range(model.args.n_layers)
        with layer_window(model, layers, run.clean[None]), patch(model, circuit.edits()):
            total += run.weight * measure(model, Batch.from_texts(model, [run.text]), [run.metric]).item()
    return total


class _Circuit:
    """Edits that turn a pass of the clean text into a run of a circuit, `mask` (receivers, senders)."""

    def __init__(self, model: Transformer, run: Run, mask: Tensor):
        self.model, self.mask = model, mask
        layers = range(model.args.n_layers)
        streams = [f"layers.{layer}.{part}" for layer in layers for part in ("residual_pre", "residual_mid", "residual_post")]
        self.corrupted = run.trace(model, 0.0, [*written_names(model), *streams])
        # Output of the senders so far in this run minus in the corrupted one: (senders, T, D).
        self.changes = (run.clean.float() - run.corrupted.float())[None]

    def edits(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """The edits by name, for `patch`; they run in the model's order."""
        out: dict[str, Callable[[Tensor], Tensor]] = {}
        for layer in range(self.model.args.n_layers):
            first = first_receiver(self.model.args, layer)
            for name, weights in layer_ports(self.model, layer):
                out[name] = self._reader(layer, slice(first, first + len(weights)), weights)
                first += len(weights)
            out[f"layers.{layer}.attention.head_output"] = self._heads(layer)
            out[f"layers.{layer}.ffn.norm"] = self._ffn_reader(layer, first)
            out[f"layers.{layer}.ffn.output"] = self._ffn(layer)
        out[f"layers.{layer}.residual_post"] = lambda value: self._stream(f"layers.{layer}.residual_post", slice(-1, None))
        return out

    def _stream(self, name: str, receivers: slice) -> Tensor:
        """The stream `name` as each of these receivers reads it: (receivers, T, D) in the model's dtype."""
        corrupted = self.corrupted[name]  # (1, T, D)
        mask = self.mask[receivers, : len(self.changes)]
        return (corrupted.float() + torch.einsum("rs,std->rtd", mask, self.changes)).to(corrupted)

    def _reader(self, layer: int, receivers: slice, weights: Tensor) -> Callable[[Tensor], Tensor]:
        """An edit that computes queries, keys or values from each head's own stream: (1, T, heads, hd)."""

        def change(value: Tensor) -> Tensor:
            normed = self.model.layers[layer].attention_norm(self._stream(f"layers.{layer}.residual_pre", receivers))
            return torch.einsum("htd,hed->the", normed.float(), weights)[None].to(value)

        return change

    def _ffn_reader(self, layer: int, receiver: int) -> Callable[[Tensor], Tensor]:
        def change(value: Tensor) -> Tensor:
            return self.model.layers[layer].ffn_norm(
                self._stream(f"layers.{layer}.residual_mid", slice(receiver, receiver + 1))
            )

        return change

    def _heads(self, layer: int) -> Callable[[Tensor], Tensor]:
        """An edit that records what the heads write and leaves the value unchanged."""

        def change(value: Tensor) -> Tensor:
            heads = value[0].float() - self.corrupted[f"layers.{layer}.attention.head_output"][0].float()
            self._add(head_results(self.model, layer, heads), n_before(self.model.args, layer))
            return value

        return change

    def _ffn(self, layer: int) -> Callable[[Tensor], Tensor]:
        def change(value: Tensor) -> Tensor:
            own = value.float() - self.corrupted[f"layers.{layer}.ffn.output"].float()
            self._add(own, n_before(self.model.args, layer) + self.model.args.n_heads)
            return value

        return change

    def _add(self, changes: Tensor, n_expected: int) -> None:
        assert len(self.changes) == n_expected
        self.changes = torch.cat([self.changes, changes])
