"""Hugging Face's tables of tile positions: a row for each grid of tiles that an image may have.

Meta's tables, (n, n, P, W) for n tiles, hold one entry for each place, shared by all grids with that
place. Hugging Face's, (1 + grids, n · P · W), repeat it in the row of every such grid. Row 0 means no
image. In the row of a grid with fewer than n tiles, the others are zeros. Places that no grid has,
such as the third one of the second row with four tiles, are not in Hugging Face's tables.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llama_ref.errors import CheckpointError

if TYPE_CHECKING:  # `verify` needs the shapes alone, and does not wait for torch
    from torch import Tensor

Grid = tuple[int, int]  # rows and columns


def tile_grids(n_tiles: int) -> list[Grid]:
    """The grids of at most `n_tiles` tiles, in the order of their ids, which count from 1."""
    return [(rows, columns) for rows in range(1, n_tiles + 1) for columns in range(1, n_tiles // rows + 1)]


def table_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of Hugging Face's form of a table (n, n, P, W)."""
    n, _, tokens, width = shape
    return 1 + len(tile_grids(n)), n * tokens * width


def to_grid_rows(table: "Tensor") -> "Iterator[Tensor]":
    """The rows (1, n · P · W) of Hugging Face's form of a table (n, n, P, W), one at a time."""
    n, _, *vector = table.shape
    yield table.new_zeros(1, n, *vector).flatten(1)
    for rows, columns in tile_grids(n):
        row = table.new_zeros(1, n, *vector)
        row[0, : rows * columns] = table[:rows, :columns].flatten(0, 1)
        yield row.flatten(1)


def in_grids(table: "Tensor") -> "Tensor":
    """A copy of a table (n, n, P, W) with zeros for places that no grid has."""
    out = table.new_zeros(table.shape)
    for rows, columns in tile_grids(len(table)):
        out[:rows, :columns] = table[:rows, :columns]
    return out


def from_grid_rows(name: str, stored: "Tensor", shape: tuple[int, ...]) -> "Tensor":
    """A table (n, n, P, W) from Hugging Face's form, with zeros for places that no grid has.

    Raises CheckpointError if its rows have different vectors for a place, as after training each
    row separately.
    """
    import torch

    n, grids = shape[0], tile_grids(shape[0])
    table = stored.new_zeros(shape)
    for (rows, columns), row in zip(grids, stored[1:], strict=True):
        vectors = row.view(n, *shape[2:])
        table[:rows, :columns] = vectors[: rows * columns].unflatten(0, (rows, columns))
    for number, row in enumerate(to_grid_rows(table)):
        if number and not row.view(torch.uint8).equal(stored[number : number + 1].view(torch.uint8)):
            rows, columns = grids[number - 1]
            raise CheckpointError(
                f"{name} has another vector for a tile in the grid of {rows} × {columns} tiles than in other grids, or one for "
                "an empty tile: the tables were trained for each grid separately, but Meta's model has only one vector for "
                "each place"
            )
    return table
