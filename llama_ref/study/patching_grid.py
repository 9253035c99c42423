"""Activation patching over a grid: find where in the model two texts are told apart.

Each cell of the grid is a run of the corrupted text with one activation, at one layer and one
position or head, taken from the clean text's run. A metric of the last token's logits measures how
much of the clean answer that restores. Source: Meng et al., arXiv:2202.05262.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.study.hooks import check_model
from llama_ref.study.inputs import check_over, one_each, one_row
from llama_ref.study.names import LAYER_AXES, matching
from llama_ref.study.patch import patch
from llama_ref.study.texts import Batch, Text, Texts, as_texts, split_passes
from llama_ref.study.trace import Trace, trace_each

Metric = Callable[[Tensor], Tensor]  # logits (n, V) after the last token -> (n,)

DEFAULT_NAMES = {"position": "residual_pre", "head": "attention.head_output"}


@dataclass(frozen=True)
class Grid:
    """The metric of every cell.

    `values` is float32 (layers, positions or heads); `axes` and `labels` name its dimensions and
    their indices. `name` is the patched activation; `clean` and `corrupted` are the metric of the
    two texts without a patch.
    """

    values: np.ndarray
    axes: tuple[str, str]
    labels: tuple[list[str], list[str]]
    name: str
    clean: float
    corrupted: float

    @property
    def restored(self) -> np.ndarray:
        """Share of the difference that each cell restores: 0 as corrupted, 1 as clean; float64.

        NaN if the two texts do not differ.
        """
        gap = self.clean - self.corrupted
        with np.errstate(invalid="ignore"):  # infinite logits
            return (self.values.astype(np.float64) - self.corrupted) / (gap or math.nan)

    def to_json(self) -> dict[str, Any]:
        """The grid as plain lists, numbers and strings, for json.dumps."""
        return {
            "activation": self.name,
            "axes": [{"name": name, "labels": labels} for name, labels in zip(self.axes, self.labels, strict=True)],
            "clean": self.clean,
            "corrupted": self.corrupted,
            "values": self.values.tolist(),
        }


def patch_grid(
    model: Transformer,
    clean: Text,
    corrupted: Text,
    metric: Metric,
    over: str = "layer×position",
    name: str | None = None,
    progress: Progress | None = None,
) -> Grid:
    """Measure the corrupted text with each cell's activation taken from the clean text.

    `clean` and `corrupted` are ids of two texts of the same length. `over` is "layer×position" or
    "layer×head". `name` is an activation of a layer (default: residual_pre for positions,
    attention.head_output for heads). Cells of a layer run in batches of up to 1024 tokens.
    `progress` is called with the cells done and their number. Raises RequestError for texts of
    different lengths or a name without that axis.
    """
    texts = one_row(model, clean), one_row(model, corrupted)
    return patch_grids(model, *texts, metric, over, name, progress)[0]


@torch.no_grad()
def patch_grids(
    model: Transformer,
    clean: Texts,
    corrupted: Texts,
    metrics: Metric | Sequence[Metric],
    over: str = "layer×position",
    name: str | None = None,
    progress: Progress | None = None,
) -> list[Grid]:
    """Do `patch_grid` for several pairs of texts, the cells of all pairs together.

    The two texts of a pair have the same length; pairs may differ. `metrics` is one for each pair,
    or one for all. Memory: `name` of all layers, for all clean texts. Raises RequestError.
    """
    check_model(model)
    pairs = _pairs(as_texts(model, clean), as_texts(model, corrupted), metrics)
    axis = check_over(over, '"layer×position" or "layer×head"').removeprefix("layer×")
    name = _name(model, name, axis)
    baselines = [
        _measure(model, [(pair.clean, pair.metric) for pair in pairs]).tolist(),
        _measure(model, [(pair.corrupted, pair.metric) for pair in pairs]).tolist(),
    ]
    sources = list(trace_each(model, [pair.clean for pair in pairs], f"layers.*.{name}"))
    dim = LAYER_AXES[name].index(axis)
    widths = [source[f"layers.0.{name}"].shape[dim] for source in sources]
    cells = [
        _Cell(pair, source, dim, index)
        for pair, source, width in zip(pairs, sources, widths, strict=True)
        for index in range(width)
    ]
    values = _run_cells(model, cells, name, progress).split(widths, dim=1)
    return [
        Grid(own.numpy(), ("layer", axis), (_labels(len(own)), _labels(own.shape[1])), name, *both)
        for own, *both in zip(values, *baselines, strict=True)
    ]


@dataclass(frozen=True)
class _Pair:
    clean: Tensor  # ids (T,)
    corrupted: Tensor  # ids (T,)
    metric: Metric


@dataclass(frozen=True)
class _Cell:
    """What one column of a grid copies: index `index` of axis `dim`, from the clean text's trace."""

    pair: _Pair
    source: Trace
    dim: int
    index: int

    def copy(self, name: str, value: Tensor) -> None:
        """Copy it into one row of the pass, (1, …), which may have padding behind the text."""
        source = self.source[name]
        there = value[tuple(map(slice, source.shape))]
        there.select(self.dim, self.index).copy_(source.select(self.dim, self.index))


def _run_cells(model: Transformer, cells: Sequence[_Cell], name: str, progress: Progress | None) -> Tensor:
    """The metric of every cell in every layer: float32 (n_layers, cells), on the CPU."""
    values = torch.empty(model.args.n_layers, len(cells), device="cpu")
    counter = ProgressCounter(values.numel(), progress)
    passes = list(split_passes([len(cell.pair.corrupted) for cell in cells]))
    for layer, row in enumerate(values):
        key = f"layers.{layer}.{name}"
        for some in passes:
            chosen = cells[some.start : some.stop]
            with patch(model, {key: _copy_cells(key, chosen)}):
                row[some.start : some.stop] = _measure(model, [(cell.pair.corrupted, cell.pair.metric) for cell in chosen])
            counter.advance(len(chosen))
    return values


def _copy_cells(name: str, cells: Sequence[_Cell]) -> Callable[[Tensor], Tensor]:
    """An edit that copies the n-th cell into the n-th row."""

    def change(value: Tensor) -> Tensor:
        for cell, row in zip(cells, value.split(1), strict=True):
            cell.copy(name, row)
        return value

    return change


def _pairs(clean: Sequence[Tensor], corrupted: Sequence[Tensor], metrics: Metric | Sequence[Metric]) -> list[_Pair]:
    """The pairs of texts with their metrics. Raises RequestError for what does not match."""
    if len(clean) != len(corrupted):
        raise RequestError(f"there are {len(clean)} clean and {len(corrupted)} corrupted texts, expected as many of each")
    pairs = [_Pair(*each) for each in zip(clean, corrupted, one_each("metrics", metrics, len(clean)), strict=True)]
    for i, pair in enumerate(pairs):
        where = f"in pair {i}, " if len(pairs) > 1 else ""
        if not callable(pair.metric):
            expected = "expected probability(…), logit_difference(…) or a function of logits"
            raise RequestError(f"{where}metric is {pair.metric!r:.60}, {expected}")
        if len(pair.clean) != len(pair.corrupted):
            raise RequestError(
                f"{where}the clean text has {len(pair.clean)} tokens and the corrupted text {len(pair.corrupted)}, expected two"
                " of the same length"
            )
    return pairs


def _labels(n: int) -> list[str]:
    return [str(i) for i in range(n)]


def logit_difference(target: int, other: int) -> Metric:
    """The target's logit minus the other's."""

    def difference(logits: Tensor) -> Tensor:
        return logits[:, _check_token(target, logits)] - logits[:, _check_token(other, logits)]

    return difference


def probability(target: int) -> Metric:
    """The target's probability."""
    return lambda logits: logits.float().softmax(-1)[:, _check_token(target, logits)]


def _check_token(token: int, logits: Tensor) -> int:
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < logits.shape[-1]:
        raise RequestError(f"the metric's token is {token!r:.40}; the vocabulary has 0 to {logits.shape[-1] - 1}")
    return token


def _measure(model: Transformer, runs: Sequence[tuple[Tensor, Metric]]) -> Tensor:
    """Each text's metric after its last token: float32 (n,), on the CPU."""
    found = []
    for some in split_passes([len(text) for text, _ in runs]):
        texts, metrics = zip(*runs[some.start : some.stop], strict=True)
        batch = Batch.of(model, texts)
        logits = model.logits(batch.last(batch.hidden(model)))  # (n, V)
        for metric, own in groupby(zip(metrics, logits, strict=True), key=itemgetter(0)):
            found.append(_apply(metric, torch.stack([row for _, row in own])))
    return torch.cat(found).cpu()


def _apply(metric: Metric, logits: Tensor) -> Tensor:
    out = metric(logits)
    if not isinstance(out, Tensor) or out.shape != logits.shape[:1]:
        found = f"a tensor {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise RequestError(
            f"the metric returned {found} for logits of {len(logits)} rows, expected a tensor of {len(logits)} numbers"
        )
    return out.float()


def _name(model: Transformer, name: str | None, axis: str) -> str:
    name = DEFAULT_NAMES[axis] if name is None else name
    if name not in LAYER_AXES:
        matching(model.args, f"layers.*.{name}")  # raises with similar names
        raise RequestError(f"name is {name!r:.60}, expected one activation of a layer, not a glob")
    if axis not in LAYER_AXES[name]:
        fitting = [other for other, other_axes in LAYER_AXES.items() if axis in other_axes]
        raise RequestError(f"{name} has no {axis} axis; take one of {', '.join(fitting)}")
    return name
