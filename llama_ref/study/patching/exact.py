"""Activation patching over a grid: find the activations that carry the difference between two texts.

Each cell of the grid is a run of the corrupted text with one activation, at one layer and one
position or head, taken from the clean text's run. A metric of the last token's logits measures how
much of the clean answer this restores. Source: Meng et al., arXiv:2202.05262.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llama_ref.model import Transformer
from llama_ref.parallel.division import whole_args
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.study.inputs import one_row
from llama_ref.study.passes.hooks import check_part
from llama_ref.study.passes.pass_size import tokens_that_fit
from llama_ref.study.patch import patch
from llama_ref.study.patching.cells import CellAxes
from llama_ref.study.patching.grid import Grid
from llama_ref.study.patching.metrics import Metric, measure
from llama_ref.study.patching.noise import Noise
from llama_ref.study.patching.pairs import Baselines, Corrupted, Pair, as_pairs, run_owners
from llama_ref.study.patching.streams import Streams
from llama_ref.study.texts import Text, Texts


def patch_grid(
    model: Transformer,
    clean: Text,
    corrupted: Text | Noise,
    metric: Metric,
    over: str = "layer×position",
    name: str | None = None,
    progress: Progress | None = None,
) -> Grid:
    """Measure the corrupted text with each cell's activation taken from the clean text.

    `clean` and `corrupted` are ids of two texts of the same length; or `corrupted` is `noise(…)`, which is
    added to the clean text. `over` is "layer×position", "layer×head" or "layer×position×head". `name` is an
    activation of a layer (default: residual_pre for positions, attention.head_output for heads).
    Cells of a layer run in batches, from that layer on. `progress` is called with the runs done and
    their number. Raises RequestError for texts of different lengths or a name without these axes.
    """
    others = corrupted if isinstance(corrupted, Noise) else one_row(model, corrupted)
    return patch_grids(model, one_row(model, clean), others, metric, over, name, progress)[0]


@torch.no_grad()
def patch_grids(
    model: Transformer,
    clean: Texts,
    corrupted: Corrupted,
    metrics: Metric | Sequence[Metric],
    over: str = "layer×position",
    name: str | None = None,
    progress: Progress | None = None,
) -> list[Grid]:
    """Do `patch_grid` for several pairs of texts; cells of different pairs share passes.

    The two texts of a pair have the same length; pairs may differ. `metrics` is one for each pair,
    or one for all; so is `noise(…)`. Memory: one layer's `name` and residual streams, for all texts.
    Raises RequestError.
    """
    check_part(model)
    pairs = as_pairs(model, clean, corrupted, metrics)
    axes = CellAxes.for_grid(model, over, name)
    pass_tokens = tokens_that_fit(model, axes.name, max(len(pair.clean) for pair in pairs))
    ends = Baselines.from_pairs(model, pairs, pass_tokens)
    values = _run_cells(ends.clean, ends.corrupted, pairs, axes, progress)
    return [axes.grid(*each) for each in zip(values, ends.clean_metrics, ends.corrupted_metrics, strict=True)]


@dataclass(frozen=True)
class _Cell:
    """One cell of every layer: the corrupted run to patch, its pair, and the cell's index."""

    run: int
    pair: int
    index: tuple[int, ...]


def _run_cells(
    clean: Streams, corrupted: Streams, pairs: Sequence[Pair], axes: CellAxes, progress: Progress | None
) -> list[Tensor]:
    """The metric of every cell in every layer: float32 (n_layers, …) for each pair, on the CPU."""
    shapes = [axes.shape(len(pair.clean)) for pair in pairs]
    cells = [_Cell(run, pair, index) for run, pair in enumerate(run_owners(pairs)) for index in np.ndindex(shapes[pair])]
    runs = [cell.run for cell in cells]
    values = torch.empty(whole_args(clean.model).n_layers, len(cells), device="cpu")
    counter = ProgressCounter(values.numel(), progress)
    for layer, row in enumerate(values):
        sources = clean.advance(axes.name)
        for some in corrupted.passes(runs):
            chosen = cells[some.start : some.stop]
            edit = {f"layers.{layer}.{axes.name}": _copy_cells(axes, chosen, sources)}
            metrics = [pairs[cell.pair].metric for cell in chosen]
            with corrupted.resumed(runs[some.start : some.stop]) as batch, patch(clean.model, edit):
                row[some.start : some.stop] = measure(clean.model, batch, metrics)
            counter.advance(len(chosen))
        corrupted.advance()
    parts = values.split([int(np.prod(shapes[pair])) * pairs[pair].n_runs for pair in range(len(pairs))], dim=1)
    return [
        part.unflatten(1, (pair.n_runs, *shape)).double().mean(1).float()
        for part, pair, shape in zip(parts, pairs, shapes, strict=True)
    ]


def _copy_cells(axes: CellAxes, cells: Sequence[_Cell], sources: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """An edit that copies the n-th cell, from its clean text, into the n-th row."""

    def change(value: Tensor) -> Tensor:
        for cell, row in zip(cells, value.split(1), strict=True):
            axes.copy(cell.index, sources[cell.pair], row)
        return value

    return change
