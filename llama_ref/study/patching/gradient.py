"""Attribution patching: all cells of a grid estimated by one gradient.

Patching adds to an activation the difference of two runs. To first order the metric changes by that
difference times the metric's gradient, which one backward pass gives for every cell. Sources: Nanda,
"Attribution Patching" (2023); with integrated gradients, Sundararajan et al., arXiv:1703.01365.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.study.gradients import gradients
from llama_ref.study.hooks import check_model
from llama_ref.study.inputs import one_row
from llama_ref.study.layer_window import layer_window
from llama_ref.study.pass_size import tokens_that_fit
from llama_ref.study.patch import patch, set_to
from llama_ref.study.patching.cells import CellAxes
from llama_ref.study.patching.grid import Grid
from llama_ref.study.patching.metrics import Metric, measure, measure_hidden
from llama_ref.study.patching.noise import Noise
from llama_ref.study.patching.pairs import Baselines, Corrupted, Pair, as_pairs, run_metrics, run_owners
from llama_ref.study.patching.streams import Streams
from llama_ref.study.texts import Batch, Text, Texts
from llama_ref.study.trace import trace

Path = Literal["inputs", "activation"]


def attribution_patch(
    model: Transformer,
    clean: Text,
    corrupted: Text | Noise,
    metric: Metric,
    over: str = "layer×position",
    name: str | None = None,
    *,
    steps: int | None = None,
    along: Path = "inputs",
    progress: Progress | None = None,
) -> Grid:
    """Estimate `patch_grid`, whose arguments these are: two forward passes and one backward.

    By default the gradient is that of the corrupted text. With `steps` it is the mean of so many
    between the two texts (integrated gradients). `along` "inputs", embeddings move from the corrupted
    text's to the clean one's: a pass a step. `along` "activation", `name` of one layer moves, all its
    cells together: a pass a step and layer; with enough steps a layer's estimates then add up to what
    patching the whole layer does. Quantized models: see gradients.py. `progress` is called with the
    passes' texts done and their number. Raises RequestError as `patch_grid` does, and for a metric
    that has no gradient.
    """
    others = corrupted if isinstance(corrupted, Noise) else one_row(model, corrupted)
    grids = attribution_patches(
        model, one_row(model, clean), others, metric, over, name, steps=steps, along=along, progress=progress
    )
    return grids[0]


def attribution_patches(
    model: Transformer,
    clean: Texts,
    corrupted: Corrupted,
    metrics: Metric | Sequence[Metric],
    over: str = "layer×position",
    name: str | None = None,
    *,
    steps: int | None = None,
    along: Path = "inputs",
    progress: Progress | None = None,
) -> list[Grid]:
    """Do `attribution_patch` for several pairs of texts, as `patch_grids` does.

    Memory: a backward pass keeps the activations of all layers, for the texts of one pass.
    """
    check_model(model)
    pairs = as_pairs(model, clean, corrupted, metrics)
    axes = CellAxes.of(model, over, name)
    shares = path_shares(steps)
    if along not in ("inputs", "activation"):
        raise RequestError(f"along is {along!r:.40}, expected inputs or activation")
    with torch.no_grad():
        longest = max(len(pair.clean) for pair in pairs)
        pass_tokens = tokens_that_fit(model, axes.name, longest, gradients=True)
        ends = Baselines.of(model, pairs, pass_tokens)
        estimate = _Estimate(model, axes, ends.clean, ends.corrupted, pairs, shares)
        effects = estimate.along_inputs(progress) if along == "inputs" else estimate.along_activation(progress)
        means = _mean_effects(effects, pairs)
    return [
        axes.grid(effect + theirs, ours, theirs)
        for effect, ours, theirs in zip(means, ends.clean_metrics, ends.corrupted_metrics, strict=True)
    ]


def path_shares(steps: int | None) -> list[float]:
    """Where on the way from corrupted (0) to clean (1) gradients are taken: middles of equal parts."""
    if steps is None:
        return [0.0]
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise RequestError(f"steps is {steps!r:.40}, expected a whole number from 1, or None for one gradient")
    return [(i + 0.5) / steps for i in range(steps)]


def gradient_of(total: Tensor, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradient of a metric by each value. Raises RequestError for a metric that has none."""
    if not total.requires_grad:
        raise RequestError("the metric's result has no gradient: compute it from the logits by PyTorch's functions")
    return torch.autograd.grad(total, values)


def difference(clean: Tensor, corrupted: Tensor) -> Tensor:
    """Their difference in float32; 0 where both are the same infinity, as masked scores are."""
    return torch.where(clean == corrupted, 0, clean.float() - corrupted.float())


def _mean_effects(effects: Sequence[Tensor], pairs: Sequence[Pair]) -> list[Tensor]:
    """Each pair's mean over its runs: float32 (n_layers, …), on the CPU."""
    own = iter(effects)
    return [torch.stack([next(own) for _ in range(pair.n_runs)]).double().mean(0).float() for pair in pairs]


@dataclass
class _Estimate:
    """What a gradient's estimates are made of: the two texts of every run, and points between them."""

    model: Transformer
    axes: CellAxes
    clean: Streams
    corrupted: Streams
    pairs: Sequence[Pair]
    shares: Sequence[float]

    def __post_init__(self) -> None:
        self.owners = run_owners(self.pairs)
        self.metrics = run_metrics(self.pairs)

    def along_inputs(self, progress: Progress | None) -> list[Tensor]:
        """The effects of every run's cells: (n_layers, …) each."""
        layers = range(self.model.args.n_layers)
        keys = [f"layers.{layer}.{self.axes.name}" for layer in layers]
        counter = ProgressCounter((1 + len(self.shares)) * len(self.owners), progress)
        out: list[Tensor] = []
        for some in self.corrupted.passes(range(len(self.owners))):
            theirs, ours = self.corrupted.stacked(some), self.clean.stacked([self.owners[run] for run in some])
            texts = [self.corrupted.texts[run] for run in some]
            batch = Batch.of(self.model, texts)
            ends = []
            for stream in (ours, theirs):
                with layer_window(self.model, layers, stream):
                    traced = trace(self.model, texts, keys)
                ends.append([traced[key] for key in keys])
            counter.advance(len(some))
            total = [torch.zeros_like(value, dtype=torch.float32) for value in ends[0]]
            for share in self.shares:
                with layer_window(self.model, layers, theirs + share * (ours - theirs)):
                    traced = trace(self.model, texts, [*keys, "norm"], requires_grad=True)
                with gradients(self.model):
                    found = measure_hidden(self.model, batch, traced["norm"], self.metrics[some.start : some.stop])
                    grads = gradient_of(found.sum(), [traced[key] for key in keys])
                for sum_so_far, grad in zip(total, grads, strict=True):
                    sum_so_far += grad / len(self.shares)
                counter.advance(len(some))
            effects = [difference(*both) * grad for *both, grad in zip(*ends, total, strict=True)]
            out += [torch.stack([self._cells(layer, i, batch) for layer in effects]).cpu() for i in range(len(some))]
        return out

    def along_activation(self, progress: Progress | None) -> list[Tensor]:
        """The same, where one layer's activation moves from the corrupted text's to the clean one's."""
        args = self.model.args
        runs = range(len(self.owners))
        counter = ProgressCounter(args.n_layers * len(self.owners), progress)
        out: list[list[Tensor]] = [[] for _ in runs]
        for layer in range(args.n_layers):
            key = f"layers.{layer}.{self.axes.name}"
            before = Streams(self.model, self.corrupted.texts, self.corrupted.values, self.corrupted.pass_tokens)
            before.layer = layer
            ours, theirs = self.clean.advance(self.axes.name), self.corrupted.advance(self.axes.name)
            for some in before.passes(runs):
                for run in some:
                    out[run].append(self._effect(before, run, key, ours[self.owners[run]], theirs[run]))
                counter.advance(len(some))
        return [torch.stack(layers) for layers in out]

    def _effect(self, before: Streams, run: int, key: str, clean: Tensor, corrupted: Tensor) -> Tensor:
        """The effects of one run's cells in one layer."""
        change = difference(clean, corrupted)
        total = torch.zeros_like(change)
        for share in self.shares:
            moved = torch.where(clean == corrupted, corrupted, corrupted + share * change.to(corrupted))
            with ExitStack() as block:
                block.enter_context(gradients(self.model))
                batch = block.enter_context(before.resumed([run]))
                point = moved.clone().requires_grad_()
                block.enter_context(patch(self.model, {key: set_to(point)}))
                found = measure(self.model, batch, [self.metrics[run]])
                total += gradient_of(found.sum(), [point])[0] / len(self.shares)
        return self.axes.sum_cells(change * total).cpu()

    def _cells(self, effect: Tensor, row: int, batch: Batch) -> Tensor:
        """The sums of one text's cells, without its padding."""
        cells = self.axes.sum_cells(effect[row : row + 1])
        return cells[tuple(slice(n) for n in self.axes.shape(batch.lengths[row]))]
