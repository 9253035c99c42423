"""A grid of patched cells, exact or estimated, and how well two of them agree."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from llama_ref.errors import RequestError
from llama_ref.study.patching.noise import Noise

Measure = Literal["probability", "log-probability"]


@dataclass(frozen=True)
class Grid:
    """The metric of every cell.

    `values` is float32, one dimension for each of `axes`: (layers, positions), (layers, heads) or
    (layers, positions, heads); `labels` name their indices. `name` is the patched activation;
    `clean` and `corrupted` are the metric of the two texts without a patch. If noise replaces the
    corrupted text, all values are means over its seeds.
    """

    values: np.ndarray
    axes: tuple[str, ...]
    labels: tuple[list[str], ...]
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

    def strongest_heads(self) -> "Grid":
        """Reduce a grid of layers, positions and heads to layers and positions: the head with the largest effect.

        An effect may be below 0; NaN counts only where all heads have it.
        """
        effects = np.abs(self.restored)
        heads = np.where(np.isnan(effects), -1, effects).argmax(-1, keepdims=True)
        values = np.take_along_axis(self.values, heads, -1)[..., 0]
        return replace(self, values=values, axes=self.axes[:-1], labels=self.labels[:-1])

    def best_cells(self, n: int) -> list[tuple[float, tuple[int, ...]]]:
        """The n cells that restore most, as (share, index), the largest first; without NaN."""
        cells = [(float(share), index) for index, share in np.ndenumerate(self.restored) if not math.isnan(share)]
        return sorted(cells, reverse=True)[:n]

    def cell_name(self, index: tuple[int, ...], tokens: Sequence[str]) -> str:
        """Name a cell: "layer 23, head 4", "layer 3, Paris@2" or "layer 3, Paris@2, head 4"."""
        layer, *rest = index
        parts = [f"layer {self.labels[0][layer]}"]
        for axis, i in zip(self.axes[1:], rest, strict=True):
            parts.append(f"{tokens[i]}@{i}" if axis == "position" else f"head {i}")
        return ", ".join(parts)

    def agreement(self, exact: "Grid") -> "Agreement":
        """How close this grid, an estimate, is to the exact one. Raises RequestError if their cells differ."""
        if (self.name, self.axes, self.values.shape) != (exact.name, exact.axes, exact.values.shape):
            shown = [f"{grid.name} over {'×'.join(grid.axes)} {grid.values.shape}" for grid in (self, exact)]
            raise RequestError(f"the grids are of {shown[0]} and of {shown[1]}, expected two of the same cells")
        return Agreement.between(self.values, exact.values)

    def to_json(self) -> dict[str, Any]:
        """The grid as plain lists, numbers and strings, for json.dumps."""
        return {
            "activation": self.name,
            "axes": [{"name": name, "labels": labels} for name, labels in zip(self.axes, self.labels, strict=True)],
            "clean": self.clean,
            "corrupted": self.corrupted,
            "values": self.values.tolist(),
        }


@dataclass(frozen=True)
class GridPair:
    """A grid and its estimate, or one of the two, with their texts and tokens.

    With `noise`, `corrupted` is the clean text. `measure` is the metric of the target if there is no
    `other`; otherwise it is the difference of the two logits.
    """

    exact: Grid | None
    estimate: Grid | None
    clean: Sequence[int]
    corrupted: Sequence[int]
    target: int
    other: int | None
    noise: Noise | None = None
    measure: Measure = "probability"

    @property
    def grids(self) -> list[Grid]:
        """The grids that exist, the exact one first."""
        return [grid for grid in (self.exact, self.estimate) if grid is not None]

    @property
    def agreement(self) -> "Agreement | None":
        """How well the two grids agree, or None unless both exist."""
        return None if self.exact is None or self.estimate is None else self.estimate.agreement(self.exact)


@dataclass(frozen=True)
class Agreement:
    """How close an estimate is to the exact values: Pearson's correlation, and the largest difference.

    The correlation is NaN if all values on one side are equal.
    """

    correlation: float
    largest_difference: float

    @classmethod
    def between(cls, estimate: np.ndarray, exact: np.ndarray) -> "Agreement":
        """Compare two arrays of the same shape."""
        ours, theirs = (values.astype(np.float64).ravel() for values in (estimate, exact))
        with np.errstate(invalid="ignore"):
            a, b = ours - ours.mean(), theirs - theirs.mean()
            length = math.sqrt((a @ a) * (b @ b))
            return cls(float(a @ b) / length if length else math.nan, float(np.abs(ours - theirs).max()))
