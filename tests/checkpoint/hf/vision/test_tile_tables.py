"""Tables of tile positions: one vector for each place, or a row for each grid of tiles."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_ref.checkpoint.hf.vision.tile_tables import from_grid_rows, in_grids, table_shape, tile_grids, to_grid_rows
from llama_ref.errors import CheckpointError


def table(n: int, tokens: int = 2, width: int = 3) -> torch.Tensor:
    return torch.randn(n, n, tokens, width)


def test_the_grids_of_four_tiles_are_in_transformers_order():
    assert tile_grids(4) == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]


def test_a_row_holds_its_grids_vectors_row_by_row_then_zeros():
    places = table(4)
    rows = torch.cat(list(to_grid_rows(places))).view(9, 4, 2, 3)
    assert not rows[0].any()
    assert torch.equal(rows[6], torch.stack([places[0, 0], places[0, 1], places[1, 0], places[1, 1]]))
    assert torch.equal(rows[7, :3], places[:3, 0]) and not rows[7, 3].any()


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_table_comes_back_but_for_places_that_no_grid_has(n, tokens, width, dtype):
    places = table(n, tokens, width).to(dtype)
    rows = torch.cat(list(to_grid_rows(places)))
    assert rows.shape == table_shape(tuple(places.shape))
    back = from_grid_rows("table", rows, tuple(places.shape))
    assert torch.equal(back, in_grids(places))
    for row in range(n):
        for column in range(n):
            is_used = (row + 1) * (column + 1) <= n
            assert torch.equal(back[row, column], places[row, column]) if is_used else not back[row, column].any()


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("tile", [0, 3])
def test_a_copy_or_an_empty_tile_that_differs_is_named(number, tile):
    places = table(4)
    rows = torch.cat(list(to_grid_rows(places)))
    rows.view(9, 4, 2, 3)[number, tile, 1, 2] += 1
    is_only_copy = (number, tile) in {(4, 3), (6, 3), (8, 3)}  # the fourth tile of 1 × 4, 2 × 2 and 4 × 1
    if is_only_copy:
        from_grid_rows("table", rows, tuple(places.shape))
        return
    with pytest.raises(CheckpointError, match=r"table has another vector for a tile in the grid of [1-4] × [1-4] tiles"):
        from_grid_rows("table", rows, tuple(places.shape))


def test_the_row_of_no_image_does_not_matter():
    places = table(4)
    rows = torch.cat(list(to_grid_rows(places)))
    rows[0] = 1
    assert torch.equal(from_grid_rows("table", rows, tuple(places.shape)), in_grids(places))


def test_nan_is_a_value_like_any_other():
    places = table(2)
    places[0, 1] = torch.nan
    back = from_grid_rows("table", torch.cat(list(to_grid_rows(places))), tuple(places.shape))
    assert back[0, 1].isnan().all()
