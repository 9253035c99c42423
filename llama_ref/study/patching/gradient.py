"""Attribution patching: estimate all cells of a grid with one gradient.

Patching adds the difference of two runs to an activation. To first order the metric changes by this
difference times the metric's gradient, which one backward pass gives for every cell. Sources: Nanda,
"Attribution Patching" (2023); with integrated gradients, Sundararajan et al., arXiv:1703.01365.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.numbers import is_whole
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.study.inputs import one_row
from llama_ref.study.names import LAYER_AXES
from llama_ref.study.passes.gradients import gradients
from llama_ref.study.passes.hooks import check_model
from llama_ref.study.passes.layer_window import layer_window
from llama_ref.study.passes.pass_size import tokens_that_fit
from llama_ref.study.patch import patch, set_to
from llama_ref.study.patching.cells import CellAxes
from llama_ref.study.patching.grid import Grid
from llama_ref.study.patching.metrics import Metric, measure, measure_hidden
from llama_ref.study.patching.noise import Noise
from llama_ref.study.patching.pairs import (
    Baselines,
    Corrupted,
    Pair,
    as_pairs,
    clean_streams,
    corrupted_streams,
    mean_over_seeds,
    run_metrics,
    run_owners,
)
from llama_ref.study.patching.streams import Streams
from llama_ref.study.texts import Batch, Text, Texts
from llama_ref.study.trace import Trace, trace

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
    """Estimate `patch_grid` with two forward passes and one backward pass; it takes the same arguments.

    The gradient must not vanish at the corrupted text, as that of a small probability does: take
    `logit_difference` or `log_probability`. By default it is taken at the corrupted text. With `steps` it
    is the mean of that many gradients between the two texts (integrated gradients). With `along` "inputs",
    the embeddings move from the corrupted text's to the clean text's: one pass per step. With `along`
    "activation", `name` moves in one layer at a time, all its cells together; with enough steps a layer's
    estimates add up to the effect of patching the whole layer. Its passes, with a layer's steps as rows, are
    slower than those of "inputs", and than `patch_grid`'s for short texts. Quantized models: see
    passes/gradients.py. `progress` is called with the texts done and their number, over all passes. Raises
    RequestError as `patch_grid` does, and for a metric that has no gradient.
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
    axes = CellAxes.for_grid(model, over, name)
    shares = path_shares(steps)
    if along not in ("inputs", "activation"):
        raise RequestError(f"along is {along!r:.40}, expected inputs or activation")
    if along == "inputs":
        return _along_inputs(model, pairs, [axes], shares, progress)[0]
    return _along_activation(model, pairs, axes, shares, progress)


def attribution_grids(
    model: Transformer,
    clean: Text,
    corrupted: Text | Noise,
    metric: Metric,
    over: Sequence[str] = ("layer×position", "layer×head"),
    *,
    steps: int | None = None,
    progress: Progress | None = None,
) -> list[Grid]:
    """Do `attribution_patch` over several kinds of cells at the cost of one: they share all passes."""
    check_model(model)
    others = corrupted if isinstance(corrupted, Noise) else one_row(model, corrupted)
    pairs = as_pairs(model, one_row(model, clean), others, metric)
    if isinstance(over, str) or not over:
        raise RequestError(f"over is {over!r:.60}, expected a list such as ['layer×position', 'layer×head']")
    axes = [CellAxes.for_grid(model, each, None) for each in over]
    return [grid for (grid,) in _along_inputs(model, pairs, axes, path_shares(steps), progress)]


def path_shares(steps: int | None) -> list[float]:
    """The points between corrupted (0) and clean (1) at which gradients are taken: midpoints of equal parts."""
    if steps is None:
        return [0.0]
    if not is_whole(steps) or steps < 1:
        raise RequestError(f"steps is {steps!r:.40}, expected a whole number from 1; leave it out for one gradient")
    return [(i + 0.5) / int(steps) for i in range(int(steps))]


def gradient_of(total: Tensor, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradient of a metric by each value. Raises RequestError for a metric without a gradient."""
    if not total.requires_grad:
        raise RequestError("the metric's result has no gradient: compute it from the logits with PyTorch functions")
    return torch.autograd.grad(total, values)


def difference(clean: Tensor, corrupted: Tensor) -> Tensor:
    """The difference of two tensors in float32; 0 where both are the same infinity, as in masked scores."""
    return torch.where(clean == corrupted, 0, clean.float() - corrupted.float())


# ---- the embeddings of a text move


@torch.no_grad()
def _along_inputs(
    model: Transformer, pairs: Sequence[Pair], axes: Sequence[CellAxes], shares: Sequence[float], progress: Progress | None
) -> list[list[Grid]]:
    """For each of `axes`, one grid per pair."""
    longest = max(len(pair.clean) for pair in pairs)
    pass_tokens = min(tokens_that_fit(model, each.name, longest, gradients=True) for each in axes)
    clean, corrupted = clean_streams(model, pairs, pass_tokens), corrupted_streams(model, pairs, pass_tokens)
    owners = run_owners(pairs)
    counter = ProgressCounter((1 + len(shares)) * len(owners), progress)
    effects: list[list[Tensor]] = [[] for _ in axes]
    baselines = []
    for some in corrupted.passes(range(len(owners))):
        ours, theirs = clean.stacked([owners[run] for run in some]), corrupted.stacked(some)
        texts, metrics = [corrupted.texts[run] for run in some], [pairs[owners[run]].metric for run in some]
        way = _Way(model, texts, ours, theirs, metrics, list(dict.fromkeys(each.name for each in axes)))
        changes = way.changes(shares, partial(counter.advance, len(some)))
        baselines.append(way.baselines)
        for found, each in zip(effects, axes, strict=True):
            found += [way.cells(changes[each.name], each, row) for row in range(len(some))]
    ours, theirs = torch.cat(baselines, 1).cpu()
    ends = [[value[0].item() for value in ours.split([pair.n_runs for pair in pairs])]]
    ends.append([value.item() for value in mean_over_seeds(theirs, pairs)])
    return [_grids(each, found, pairs, *ends) for each, found in zip(axes, effects, strict=True)]


class _Way:
    """The path from corrupted to clean texts: embeddings (B, T, D) at both ends, and the activations to keep."""

    def __init__(
        self,
        model: Transformer,
        texts: Sequence[Tensor],
        clean: Tensor,
        corrupted: Tensor,
        metrics: Sequence[Metric],
        names: Sequence[str],
    ):
        self.model, self.texts, self.clean, self.corrupted, self.metrics = model, texts, clean, corrupted, metrics
        self.batch = Batch.from_texts(model, texts)
        self.layers = range(model.args.n_layers)
        self.keys = {name: [f"layers.{layer}.{name}" for layer in self.layers] for name in names}
        self.baselines = torch.empty(2, len(texts), device=model.device)  # metrics of the clean and the corrupted texts

    def changes(self, shares: Sequence[float], passed: Callable[[], None]) -> dict[str, list[Tensor]]:
        """For each name, the two texts' difference times the mean gradient at `shares`, by layer."""
        keys = [key for own in self.keys.values() for key in own]
        clean = self._trace(1.0)
        self.baselines[0] = self._measure(clean)
        passed()
        gradient = {key: torch.zeros_like(clean[key], dtype=torch.float32) for key in keys}
        corrupted = None
        for share in shares:
            traced = self._trace(share, requires_grad=True)
            with gradients(self.model):
                metrics = self._measure(traced)
                grads = gradient_of(metrics.sum(), [traced[key] for key in keys])
            for key, grad in zip(keys, grads, strict=True):
                gradient[key] += grad / len(shares)
            if share == 0:  # the corrupted text itself
                corrupted, self.baselines[1] = traced, metrics.detach()
            passed()
        if corrupted is None:
            corrupted = self._trace(0.0)
            self.baselines[1] = self._measure(corrupted)
        changes = {key: difference(clean[key], corrupted[key].detach()) * gradient[key] for key in keys}
        return {name: [changes[key] for key in own] for name, own in self.keys.items()}

    def cells(self, changes: Sequence[Tensor], axes: CellAxes, row: int) -> Tensor:
        """Sum one text's changes in every cell, without its padding: (n_layers, …), on the CPU."""
        dim, n = LAYER_AXES[axes.name].index("position"), self.batch.lengths[row]
        return torch.stack([axes.sum_cells(change[row : row + 1].narrow(dim, 0, n)) for change in changes]).cpu()

    def _trace(self, share: float, *, requires_grad: bool = False) -> Trace:
        stream = torch.lerp(self.corrupted, self.clean, share)
        with layer_window(self.model, self.layers, stream):
            names = [key for own in self.keys.values() for key in own]
            return trace(self.model, self.texts, [*names, "norm"], requires_grad=requires_grad)

    def _measure(self, traced: Trace) -> Tensor:
        return measure_hidden(self.model, self.batch, traced["norm"], self.metrics)


# ---- one activation moves


@torch.no_grad()
def _along_activation(
    model: Transformer, pairs: Sequence[Pair], axes: CellAxes, shares: Sequence[float], progress: Progress | None
) -> list[Grid]:
    """The grid of every pair; one layer's activation moves from the corrupted text's to the clean text's value."""
    longest = max(len(pair.clean) for pair in pairs)
    ends = Baselines.from_pairs(model, pairs, tokens_that_fit(model, axes.name, longest, gradients=True))
    owners, metrics = run_owners(pairs), run_metrics(pairs)
    counter = ProgressCounter(model.args.n_layers * len(owners), progress)
    effects: list[list[Tensor]] = [[] for _ in owners]
    for layer in range(model.args.n_layers):
        before = Streams(model, ends.corrupted.texts, ends.corrupted.values, ends.corrupted.pass_tokens)
        before.layer = layer
        ours, theirs = ends.clean.advance(axes.name), ends.corrupted.advance(axes.name)
        for run, owner in enumerate(owners):
            change = _change(before, run, f"layers.{layer}.{axes.name}", ours[owner], theirs[run], metrics[run], shares)
            effects[run].append(axes.sum_cells(change).cpu())
            counter.advance()
    return _grids(axes, [torch.stack(layers) for layers in effects], pairs, ends.clean_metrics, ends.corrupted_metrics)


def _change(
    before: Streams, run: int, key: str, clean: Tensor, corrupted: Tensor, metric: Metric, shares: Sequence[float]
) -> Tensor:
    """The difference of an activation's two values times the mean gradient at `shares` between them, for one run.

    The points between are rows of a pass, as many as fit.
    """
    change = difference(clean, corrupted)  # (1, T, …)
    total = torch.zeros_like(change)
    n = max(1, before.pass_tokens // len(before.texts[run]))
    for some in (shares[i : i + n] for i in range(0, len(shares), n)):
        moved = [torch.where(clean == corrupted, corrupted, corrupted + share * change.to(corrupted)) for share in some]
        with ExitStack() as block:
            block.enter_context(gradients(before.model))
            batch = block.enter_context(before.resumed([run] * len(some)))
            points = torch.cat(moved).requires_grad_()
            block.enter_context(patch(before.model, {key: set_to(points)}))
            found = measure(before.model, batch, [metric] * len(some))
            total = total + gradient_of(found.sum(), [points])[0].sum(0, keepdim=True)
    return change * total / len(shares)


def _grids(
    axes: CellAxes, effects: Sequence[Tensor], pairs: Sequence[Pair], clean: Sequence[float], corrupted: Sequence[float]
) -> list[Grid]:
    """Each pair's grid, from the effects (n_layers, …) of every run and the metric of its two texts."""
    own = iter(effects)
    means = [torch.stack([next(own) for _ in range(pair.n_runs)]).double().mean(0).float() for pair in pairs]
    return [axes.grid(effect + theirs, ours, theirs) for effect, ours, theirs in zip(means, clean, corrupted, strict=True)]
