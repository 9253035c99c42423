"""Grids of exact patches: every cell equals a separate patch of a whole run."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_ref import study
from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.quantization.apply import quantize_model
from llama_ref.study.passes.layer_window import layer_window
from random_models import random_model
from study.drawn import FEW, ids_of, models
from study.patched import ARGS, RAGGED, ids


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(ARGS, seed=0)


@pytest.mark.parametrize(
    ("over", "name", "axis"),
    [
        ("layer×position", None, "position"),
        ("layer*position", "ffn.output", "position"),
        ("layer × position", "attention.pattern", "position"),
        ("layer×head", None, "head"),
        ("layer x head", "attention.v", "head"),
    ],
)
def test_a_grids_cells_are_single_patches(model, over, name, axis):
    clean, corrupted = ids(1, 5), ids(1, 5, seed=1)
    metric = study.logit_difference(3, 4)
    grid = study.patch_grid(model, clean[0].tolist(), corrupted, metric, over, name)
    source = study.trace(model, clean)
    for layer in range(3):
        for cell in range(grid.values.shape[1]):
            place = study.swap_from(source).at(**{f"{axis}s": cell})
            with study.patch(model, {f"layers.{layer}.{grid.name}": place}):
                expected = metric(model(corrupted)[:, -1]).item()
            assert grid.values[layer, cell] == pytest.approx(expected, abs=1e-4)
    assert grid.clean == pytest.approx(metric(model(clean)[:, -1]).item(), abs=1e-5)
    assert grid.axes == ("layer", axis) and [len(labels) for labels in grid.labels] == list(grid.values.shape)
    assert json.loads(json.dumps(grid.to_json()))["values"] == grid.values.tolist()
    assert grid.values.dtype == "float32"


@FEW
@given(
    models(),
    st.sampled_from([("layer×position", "residual_pre"), ("layer×head", "attention.v"), ("layer×position", "ffn.output")]),
    st.integers(1, 6),
    st.integers(0, 99),
)
def test_cells_of_drawn_shapes_are_single_patches(model, axes, length, seed):
    (over, name), metric = axes, study.logit_difference(3, 4)
    clean, corrupted = ids_of(model, length, seed), ids_of(model, length, seed + 1)
    grid = study.patch_grid(model, clean, corrupted, metric, over, name)
    source, axis = study.trace(model, clean), over.removeprefix("layer×")
    for layer, cell in np.ndindex(grid.values.shape):
        place = study.swap_from(source).at(**{f"{axis}s": cell})
        with study.patch(model, {f"layers.{layer}.{name}": place}):
            expected = metric(model(corrupted)[:, -1]).item()
        assert grid.values[layer, cell] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", [None, "attention.k", "attention.scores"])
def test_positions_of_single_heads_are_cells_too(model, name):
    clean, corrupted = ids(1, 4), ids(1, 4, seed=1)
    metric = study.logit_difference(3, 4)
    grid = study.patch_grid(model, clean, corrupted, metric, "layer,position,head", name)
    assert grid.axes == ("layer", "position", "head")
    assert grid.values.shape == (3, 4, 2 if name == "attention.k" else 8)
    source = study.trace(model, clean)
    for layer, position, head in [(0, 1, 1), (1, 0, 0), (2, 3, 1)]:
        place = study.swap_from(source).at(positions=position, heads=head)
        with study.patch(model, {f"layers.{layer}.{grid.name}": place}):
            expected = metric(model(corrupted)[:, -1]).item()
        assert grid.values[layer, position, head] == pytest.approx(expected, abs=1e-4)
    assert [len(part) for part in (grid.to_json()["axes"], grid.labels)] == [3, 3]


@pytest.mark.parametrize("scheme", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_that_start_at_a_layer_equal_whole_ones_to_the_bit(dtype, scheme):
    model = random_model(ARGS, seed=2).to(dtype)
    if scheme:
        quantize_model(model, scheme)
    text = ids(4, 6)
    whole = study.trace(model, text)
    for layer in range(3):
        with layer_window(model, range(layer, 3), whole[f"layers.{layer}.residual_pre"]):
            found = study.trace(model, text)
            assert torch.equal(model(text), whole["logits"])
        assert set(found) == {name for name in whole if not name.startswith("layers.") or int(name.split(".")[1]) >= layer}
        assert all(torch.equal(value, whole[name]) for name, value in found.items())
    assert torch.equal(model(text), whole["logits"])


def test_a_grid_leaves_nothing_behind_even_after_an_error(model):
    before, methods = model(ids(1, 5)), [dict(vars(module)) for module in model.modules()]
    study.patch_grid(model, ids(1, 5), ids(1, 5, seed=1), study.probability(1))
    with pytest.raises(ZeroDivisionError):
        study.patch_grid(model, ids(1, 5), ids(1, 5, seed=1), lambda logits: 1 / 0)
    assert torch.equal(model(ids(1, 5)), before)
    assert [set(vars(module)) for module in model.modules()] == [set(own) for own in methods]


def test_the_last_position_of_the_last_layer_is_the_whole_answer(model):
    metric = study.probability(7)
    grid = study.patch_grid(model, ids(1, 6), ids(1, 6, seed=1), metric, name="residual_post")
    assert grid.values[-1, -1] == pytest.approx(grid.clean, rel=1e-4)
    assert grid.values[-1, :-1] == pytest.approx([grid.corrupted] * 5, rel=1e-4)


def test_a_grid_of_many_cells_takes_several_passes(model, monkeypatch):
    whole = study.patch_grid(model, ids(1, 6), ids(1, 6, seed=1), study.probability(7))
    monkeypatch.setattr("llama_ref.study.passes.pass_size.PASS_TOKENS", 15)
    calls = []
    parts = study.patch_grid(
        model, ids(1, 6), ids(1, 6, seed=1), study.probability(7), progress=lambda *call: calls.append(call)
    )
    assert calls == [(done, 18) for done in (2, 4, 6, 8, 10, 12, 14, 16, 18)]
    assert parts.values == pytest.approx(whole.values, rel=1e-4)


@pytest.mark.parametrize("pass_tokens", [1024, 9])
@pytest.mark.parametrize(
    ("over", "name"), [("layer×position", None), ("layer×head", None), ("layer×position", "attention.pattern")]
)
def test_grids_of_pairs_of_different_lengths_are_each_pairs_own(model, monkeypatch, over, name, pass_tokens):
    monkeypatch.setattr("llama_ref.study.passes.pass_size.PASS_TOKENS", pass_tokens)
    corrupted = [[50 - id for id in text] for text in RAGGED]
    metrics = [study.probability(7), study.probability(8), study.logit_difference(1, 2)]
    calls = []
    grids = study.patch_grids(model, RAGGED, corrupted, metrics, over, name, progress=lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1] == sum(grid.values.size for grid in grids)
    for grid, *pair in zip(grids, RAGGED, corrupted, metrics, strict=True):
        alone = study.patch_grid(model, *pair, over, name)
        assert grid.values == pytest.approx(alone.values, abs=1e-5)
        assert (grid.clean, grid.corrupted) == pytest.approx((alone.clean, alone.corrupted), abs=1e-5)
        assert (grid.axes, grid.labels, grid.name) == (alone.axes, alone.labels, alone.name)


@pytest.mark.parametrize(
    ("corrupted", "metrics", "message"),
    [
        ([[1, 2]], study.probability(1), "there are 2 clean and 1 corrupted texts"),
        ([[1, 2], [3]], study.probability(1), "in pair 1, the clean text has 3 tokens and the corrupted text 1"),
        ([[1, 2], [3, 4, 5]], [study.probability(1)], "metrics has 1 values, expected one for each of the 2 texts"),
        ([[1, 2], [3, 4, 5]], [study.probability(1), 3], "in pair 1, metric is 3, expected"),
    ],
)
def test_pairs_that_do_not_match_are_refused(model, corrupted, metrics, message):
    with pytest.raises(RequestError, match=message):
        study.patch_grids(model, [[1, 2], [1, 2, 3]], corrupted, metrics)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corrupted": [1, 2, 3]}, "of the same length"),
        (
            {"clean": [[1, 2], [1, 2]], "corrupted": [[1, 2], [1, 2]]},
            "tokens are 2 sequences, expected one.*patch_grids take several",
        ),
        ({"over": "layer,position,head", "name": "ffn.output"}, "has no head axis; take one of attention.q_unr"),
        ({"over": "position"}, "expected layer,position or"),
        ({"over": "layer×head", "name": "ffn.output"}, "has no head axis; take one of attention.q_unrotated"),
        ({"name": "residual"}, "no activation is called"),
        ({"name": "ffn.*"}, "not a glob"),
        ({"name": "layers.1.residual_post"}, "expected it without the layer: residual_post; a grid has all layers"),
        ({"metric": study.probability(60)}, "token is 60; the vocabulary has 0 to 59"),
        ({"metric": lambda logits: 3.0}, "the metric returned a float"),
    ],
)
def test_grids_that_cannot_be_are_refused(model, options, message):
    given = {"clean": [1, 2], "corrupted": [1, 3], "metric": study.probability(1)} | options
    with pytest.raises(RequestError, match=message):
        study.patch_grid(model, **given)


@pytest.mark.parametrize("edited", ["embedding", "layers.0.residual_pre", "layers.1.residual_pre", "layers.1.residual_post"])
def test_edits_around_act_once_where_passes_resume(model, edited):
    clean, corrupted, metric = ids(1, 5), ids(1, 5, seed=1), study.logit_difference(3, 4)

    def measured(tokens):
        return metric(model.logits(model.hidden(tokens))[:, -1]).item()

    with study.patch(model, {edited: lambda value: 0.5 * value + 0.1}), torch.no_grad():
        grid = study.patch_grid(model, clean, corrupted, metric)
        assert [grid.clean, grid.corrupted] == pytest.approx([measured(clean), measured(corrupted)], abs=1e-5)
        source = study.trace(model, clean)
        for layer in range(3):
            with study.patch(model, {f"layers.{layer}.residual_pre": study.swap_from(source).at(positions=2)}):
                assert grid.values[layer, 2] == pytest.approx(measured(corrupted), abs=1e-5)
        found = study.sweep(model, clean, "layers", study.zero())
        for layer in range(3):
            joint = study.ablate_together(model, clean, f"layers.{layer}", study.zero())
            assert found.losses[layer].item() == pytest.approx(joint.losses.item(), abs=1e-5)
        paths = study.patch_path(model, clean, corrupted, metric, receivers="layers.1.ffn", positions=[])
        assert paths.values.tolist() == pytest.approx([grid.clean] * len(paths.values), abs=1e-5)
        shares = study.saliency(model, clean, 3, 4, steps=2)
        assert shares.value == pytest.approx(grid.clean, abs=1e-5)
