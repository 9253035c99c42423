"""The cells of a grid: the axes of an activation along which it is patched."""

import re
from dataclasses import dataclass

from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.parallel.division import whole_args
from llama_ref.study.inputs import check_over
from llama_ref.study.names import LAYER_AXES, matching
from llama_ref.study.patching.grid import Grid

DEFAULT_NAMES = {"position": "residual_pre", "head": "attention.head_output"}
KEY_HEADS = ("attention.k_unrotated", "attention.k", "attention.v")


@dataclass(frozen=True)
class CellAxes:
    """The axes of a grid's cells within a layer: `axes` of activation `name`, at its dimensions `dims`.

    `n_heads` is the number of the activation's heads.
    """

    name: str
    axes: tuple[str, ...]
    n_heads: int

    @classmethod
    def for_grid(cls, model: Transformer, over: str, name: str | None) -> "CellAxes":
        """Parse axes such as "layer×position". Raises RequestError, also for a name without these axes."""
        axes = tuple(check_over(over).split("×")[1:])
        name = DEFAULT_NAMES[axes[-1]] if name is None else name
        _check_name(model, name, axes)
        return cls(name, axes, whole_args(model).n_kv_heads if name in KEY_HEADS else whole_args(model).n_heads)

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(LAYER_AXES[self.name].index(axis) for axis in self.axes)

    def shape(self, n_tokens: int) -> tuple[int, ...]:
        """The number of cells of a layer along each axis, for a text of `n_tokens` tokens."""
        return tuple(n_tokens if axis == "position" else self.n_heads for axis in self.axes)

    def copy(self, index: tuple[int, ...], source: Tensor, target: Tensor) -> None:
        """Copy one cell of an activation (1, …) into another, which may have padding after the text."""
        places: list[slice | int] = [slice(size) for size in source.shape]
        for dim, i in zip(self.dims, index, strict=True):
            places[dim] = i
        target[tuple(places)] = source[tuple(places)]

    def sum_cells(self, value: Tensor) -> Tensor:
        """Sum one text's activation (1, …) over all axes except those of the cells."""
        others = [dim for dim in range(value.dim()) if dim not in self.dims]
        summed = value.sum(others)
        return summed if sorted(self.dims) == list(self.dims) else summed.T

    def grid(self, values: Tensor, clean: float, corrupted: float) -> Grid:
        """Make the grid from values (n_layers, …)."""
        labels = tuple([str(i) for i in range(n)] for n in values.shape)
        return Grid(values.numpy(), ("layer", *self.axes), labels, self.name, clean, corrupted)


def _check_name(model: Transformer, name: str, axes: tuple[str, ...]) -> None:
    if name not in LAYER_AXES:
        whole = re.fullmatch(r"layers\.(?:\d+|\*)\.(.+)", str(name))
        if whole and whole[1] in LAYER_AXES:
            raise RequestError(f"name is {name!r:.60}, expected it without the layer: {whole[1]}; a grid has all layers")
        matching(whole_args(model), f"layers.*.{name}")  # raises with similar names
        raise RequestError(f"name is {name!r:.60}, expected one activation of a layer, not a glob")
    for axis in axes:
        if axis not in LAYER_AXES[name]:
            fitting = [other for other, other_axes in LAYER_AXES.items() if set(axes) <= set(other_axes)]
            raise RequestError(f"{name} has no {axis} axis; take one of {', '.join(fitting)}")
