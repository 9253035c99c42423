"""A grid's cells: the strongest heads, the best cells and their names."""

import numpy as np
import pytest

from llama_ref.study.patching.grid import Grid

NAN = float("nan")


def a_grid(values: list, axes: tuple[str, ...] = ("layer", "position", "head")) -> Grid:
    """A grid with a metric of 1 for the corrupted text and 3 for the clean one."""
    array = np.array(values, np.float32)
    return Grid(array, axes, tuple([str(i) for i in range(n)] for n in array.shape), "attention.head_output", 3.0, 1.0)


def test_the_strongest_head_moves_the_metric_furthest_in_either_direction():
    grid = a_grid([[[1, 2, 1.5], [-2, 3, 1]], [[NAN, 1.5, 0.75], [NAN, NAN, NAN]]])
    strongest = grid.strongest_heads()
    np.testing.assert_array_equal(strongest.restored, [[0.5, -1.5], [0.25, NAN]])
    assert (strongest.axes, strongest.labels) == (("layer", "position"), (["0", "1"], ["0", "1"]))


def test_the_best_cells_restore_most_and_have_names():
    grid = a_grid([[[1, 2, 1.5], [-2, 3, 1]], [[NAN, 1.5, 0.75], [NAN, NAN, NAN]]])
    best = grid.best_cells(2)
    assert best == [(1.0, (0, 1, 1)), (0.5, (0, 0, 1))]
    assert [grid.cell_name(index, ["The", "cat"]) for _, index in best] == ["layer 0, cat@1, head 1", "layer 0, The@0, head 1"]
    assert len(grid.best_cells(100)) == 8, "NaN is left out"


@pytest.mark.parametrize(("axis", "name"), [("position", "layer 1, cat@1"), ("head", "layer 1, head 1")])
def test_a_cell_of_two_axes_has_a_name(axis, name):
    assert a_grid([[1, 2], [3, 4]], ("layer", axis)).cell_name((1, 1), ["The", "cat"]) == name
