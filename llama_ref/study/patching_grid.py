"""Activation patching over a grid: where in the model a difference between two texts is made.

The corrupted text runs once for every cell with one activation taken from the clean text's run, at one layer and one position
or head; a metric of the last token's logits says how far that brings the clean answer back. Meng et al., arXiv:2202.05262.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.study.hooks import check_model
from llama_ref.study.inputs import check_over
from llama_ref.study.names import LAYER_AXES, matching
from llama_ref.study.patch import patch
from llama_ref.study.trace import as_tokens, trace

Metric = Callable[[Tensor], Tensor]  # logits (n, V) after the last token -> (n,)
PASS_TOKENS = 1024  # of all cells that run together: bounds activations

DEFAULT_NAMES = {"position": "residual_pre", "head": "attention.head_output"}


@dataclass(frozen=True)
class Grid:
    """A metric for every cell, with labels.

    `values` float32 (layers, positions or heads); `axes` are the names of both, `labels` what stands at each. `name` is the
    activation that was patched; `clean` and `corrupted` are the metric of the two texts as they are.
    """

    values: np.ndarray
    axes: tuple[str, str]
    labels: tuple[list[str], list[str]]
    name: str
    clean: float
    corrupted: float

    @property
    def restored(self) -> np.ndarray:
        """What share of the difference each cell brings back: 0 as corrupted, 1 as clean, NaN where these do not differ.

        float64, of the values' shape.
        """
        gap = self.clean - self.corrupted
        with np.errstate(invalid="ignore"):  # infinite logits
            return (self.values.astype(np.float64) - self.corrupted) / (gap or math.nan)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain lists, numbers and texts, for json.dumps."""
        of_axes = [{"name": name, "labels": labels} for name, labels in zip(self.axes, self.labels, strict=True)]
        numbers = {"clean": self.clean, "corrupted": self.corrupted, "values": self.values.tolist()}
        return {"activation": self.name, "axes": of_axes, **numbers}


def patch_grid(
    model: Transformer,
    clean: Tensor | Sequence[int],
    corrupted: Tensor | Sequence[int],
    metric: Metric,
    over: str = "layer×position",
    name: str | None = None,
    progress: Progress | None = None,
) -> Grid:
    """The metric of the corrupted text with each cell's activation taken from the clean one.

    `clean` and `corrupted` are the ids of two texts of one length. `over` is "layer×position" or "layer×head"; `name` an
    activation of a layer, default residual_pre for positions and attention.head_output for heads. The cells of a layer run
    together, as many as make 1024 tokens. `progress` is called with the cells done
    and their number. Raises RequestError for texts of two lengths or a name without that axis.
    """
    check_model(model)
    if not callable(metric):
        raise RequestError(f"metric is {metric!r:.60}, expected probability(…), logit_difference(…) or a function of logits")
    axis = check_over(over, '"layer×position" or "layer×head"').removeprefix("layer×")
    name = _name(model, name, axis)
    clean_ids, corrupted_ids = as_tokens(model, clean), as_tokens(model, corrupted)
    if clean_ids.shape != corrupted_ids.shape or len(clean_ids) != 1:
        found = f"{tuple(clean_ids.shape)} and {tuple(corrupted_ids.shape)}"
        raise RequestError(f"the clean and the corrupted text are ids {found}, expected one row each, of one length")
    with torch.no_grad():
        source = trace(model, clean_ids, f"layers.*.{name}")
        baselines = [_measure(model, ids, metric).item() for ids in (clean_ids, corrupted_ids)]
        dim = LAYER_AXES[name].index(axis)
        n_cells = source[f"layers.0.{name}"].shape[dim]
        values = torch.empty(model.args.n_layers, n_cells)
        per_pass = max(1, PASS_TOKENS // corrupted_ids.shape[1])
        counter = ProgressCounter(values.numel(), progress)
        for layer, row in enumerate(values):
            key = f"layers.{layer}.{name}"
            for cells in torch.arange(n_cells).split(per_pass):
                with patch(model, {key: _one_each(source[key], dim, cells)}):
                    row[cells] = _measure(model, corrupted_ids.expand(len(cells), -1), metric).cpu()
                counter.advance(len(cells))
    labels = ([str(i) for i in range(model.args.n_layers)], [str(i) for i in range(n_cells)])
    return Grid(values.numpy(), ("layer", axis), labels, name, *baselines)


def logit_difference(target: int, other: int) -> Metric:
    """By how much the target's logit is above the other's."""

    def difference(logits: Tensor) -> Tensor:
        return logits[:, _in_vocabulary(target, logits)] - logits[:, _in_vocabulary(other, logits)]

    return difference


def probability(target: int) -> Metric:
    """The target's probability."""
    return lambda logits: logits.float().softmax(-1)[:, _in_vocabulary(target, logits)]


def _in_vocabulary(token: int, logits: Tensor) -> int:
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < logits.shape[-1]:
        raise RequestError(f"a metric is of token {token!r:.40}; the vocabulary has 0 to {logits.shape[-1] - 1}")
    return token


def _measure(model: Transformer, ids: Tensor, metric: Metric) -> Tensor:
    """The metric after each row: float32 (n,)."""
    out = metric(model.logits(model.hidden(ids)[:, -1]))
    if not isinstance(out, Tensor) or out.shape != ids.shape[:1]:
        found = f"a tensor {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise RequestError(f"the metric gave {found} for logits of {len(ids)} rows, expected a tensor of {len(ids)} numbers")
    return out.float()


def _one_each(source: Tensor, dim: int, cells: Tensor) -> Callable[[Tensor], Tensor]:
    """An edit: each row gets one cell of the source (1, …), the n-th row the n-th."""

    def change(value: Tensor) -> Tensor:
        for row, cell in zip(value, cells.tolist(), strict=True):
            row.select(dim - 1, cell).copy_(source[0].select(dim - 1, cell))
        return value

    return change


def _name(model: Transformer, name: str | None, axis: str) -> str:
    name = DEFAULT_NAMES[axis] if name is None else name
    if name not in LAYER_AXES:
        matching(model.args, f"layers.*.{name}")  # raises with what is near
        raise RequestError(f"name is {name!r:.60}, expected one activation of a layer, not a glob")
    if axis not in LAYER_AXES[name]:
        fitting = [other for other, its_axes in LAYER_AXES.items() if axis in its_axes]
        raise RequestError(f"{name} has no {axis} axis; take one of {', '.join(fitting)}")
    return name
