"""Activation patching over a grid: find where in the model two texts are told apart.

Each cell of the grid is a run of the corrupted text with one activation, at one layer and one
position or head, taken from the clean text's run. A metric of the last token's logits measures how
much of the clean answer that restores. Source: Meng et al., arXiv:2202.05262.
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
PASS_TOKENS = 1024  # of all cells in one batch: bounds the memory for activations

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
    clean: Tensor | Sequence[int],
    corrupted: Tensor | Sequence[int],
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
    check_model(model)
    if not callable(metric):
        raise RequestError(f"metric is {metric!r:.60}, expected probability(…), logit_difference(…) or a function of logits")
    axis = check_over(over, '"layer×position" or "layer×head"').removeprefix("layer×")
    name = _name(model, name, axis)
    clean_ids, corrupted_ids = as_tokens(model, clean), as_tokens(model, corrupted)
    if clean_ids.shape != corrupted_ids.shape or len(clean_ids) != 1:
        found = f"{tuple(clean_ids.shape)} and {tuple(corrupted_ids.shape)}"
        raise RequestError(f"the clean and the corrupted text are ids {found}, expected one row each, of the same length")
    with torch.no_grad():
        source = trace(model, clean_ids, f"layers.*.{name}")
        baselines = [_measure(model, ids, metric).item() for ids in (clean_ids, corrupted_ids)]
        dim = LAYER_AXES[name].index(axis)
        n_cells = source[f"layers.0.{name}"].shape[dim]
        values = torch.empty(model.args.n_layers, n_cells, device="cpu")
        per_pass = max(1, PASS_TOKENS // corrupted_ids.shape[1])
        counter = ProgressCounter(values.numel(), progress)
        for layer, row in enumerate(values):
            key = f"layers.{layer}.{name}"
            for cells in torch.arange(n_cells, device="cpu").split(per_pass):
                with patch(model, {key: _copy_cells(source[key], dim, cells)}):
                    row[cells] = _measure(model, corrupted_ids.expand(len(cells), -1), metric).cpu()
                counter.advance(len(cells))
    labels = ([str(i) for i in range(model.args.n_layers)], [str(i) for i in range(n_cells)])
    return Grid(values.numpy(), ("layer", axis), labels, name, *baselines)


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


def _measure(model: Transformer, ids: Tensor, metric: Metric) -> Tensor:
    """The metric after each row: float32 (n,)."""
    out = metric(model.logits(model.hidden(ids)[:, -1]))
    if not isinstance(out, Tensor) or out.shape != ids.shape[:1]:
        found = f"a tensor {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise RequestError(
            f"the metric returned {found} for logits of {len(ids)} rows, expected a tensor of {len(ids)} numbers"
        )
    return out.float()


def _copy_cells(source: Tensor, dim: int, cells: Tensor) -> Callable[[Tensor], Tensor]:
    """An edit that copies one cell of the source (1, …) into each row, the n-th into the n-th."""

    def change(value: Tensor) -> Tensor:
        for row, cell in zip(value, cells.tolist(), strict=True):
            row.select(dim - 1, cell).copy_(source[0].select(dim - 1, cell))
        return value

    return change


def _name(model: Transformer, name: str | None, axis: str) -> str:
    name = DEFAULT_NAMES[axis] if name is None else name
    if name not in LAYER_AXES:
        matching(model.args, f"layers.*.{name}")  # raises with similar names
        raise RequestError(f"name is {name!r:.60}, expected one activation of a layer, not a glob")
    if axis not in LAYER_AXES[name]:
        fitting = [other for other, other_axes in LAYER_AXES.items() if axis in other_axes]
        raise RequestError(f"{name} has no {axis} axis; take one of {', '.join(fitting)}")
    return name
