"""Causal tracing, compared with the definition of Meng et al., written with PyTorch's own hooks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_ref import study
from llama_ref.errors import RequestError
from llama_ref.quantization.apply import quantize_model
from llama_ref.study.patching.noise import embedding_deviation
from random_models import random_model
from study.drawn import FEW, ids_of, models
from study.patched import ARGS, ids

METRIC = study.probability(7)


def causal_trace(model, text, positions, scale, seed):
    """Corrupted, and corrupted with one hidden state restored: (number, (layers, positions))."""
    clean = study.trace(model, text, "layers.*.residual_pre")
    drawn = torch.randn(len(positions), model.args.dim, generator=torch.Generator().manual_seed(seed))

    def disturb(module, inputs, out):
        out = out.clone()
        out[0, positions] += scale * model.tok_embeddings.weight.std(correction=0) * drawn
        return out

    def restore(layer, position):
        def hook(module, inputs):
            x, *rest = inputs
            x = x.clone()
            x[0, position] = clean[f"layers.{layer}.residual_pre"][0, position]
            return x, *rest

        return hook

    disturbing = model.tok_embeddings.register_forward_hook(disturb)
    corrupted = METRIC(model(text)[:, -1]).item()
    values = np.zeros((model.args.n_layers, text.shape[1]))
    for layer, position in np.ndindex(values.shape):
        restoring = model.layers[layer].register_forward_pre_hook(restore(layer, position))
        values[layer, position] = METRIC(model(text)[:, -1]).item()
        restoring.remove()
    disturbing.remove()
    return corrupted, values


def test_a_grid_after_noise_is_causal_tracing():
    model, text = random_model(ARGS, seed=0), ids(1, 6)
    expected = [causal_trace(model, text, [1, 2], 2.5, seed) for seed in (0, 1, 2)]
    grid = study.patch_grid(model, text, study.noise([1, 2], scale=2.5, seeds=3), METRIC)
    assert grid.corrupted == pytest.approx(np.mean([each[0] for each in expected]), abs=1e-6)
    assert grid.values == pytest.approx(np.mean([each[1] for each in expected], axis=0), abs=1e-6)
    assert grid.clean == pytest.approx(METRIC(model(text)[:, -1]).item(), abs=1e-6)
    again = study.patch_grid(model, text, study.noise(-4, scale=2.5, seeds=[5]), METRIC, "layer,head")
    other = study.patch_grid(model, text, study.noise(2, scale=2.5, seeds=[5]), METRIC, "layer,head")
    assert (again.values == other.values).all() and again.corrupted == other.corrupted != again.clean


@FEW
@given(models(), st.integers(2, 5), st.integers(0, 99))
def test_a_grid_of_drawn_shapes_is_causal_tracing(model, length, seed):
    text = ids_of(model, length, seed)
    corrupted, values = causal_trace(model, text, [1], 2.0, seed)
    grid = study.patch_grid(model, text, study.noise(1, scale=2.0, seeds=[seed]), METRIC)
    assert grid.corrupted == pytest.approx(corrupted, abs=1e-5)
    assert grid.values == pytest.approx(values, abs=1e-5)


def test_noise_of_several_texts_is_each_texts_own():
    model = random_model(ARGS, seed=0)
    texts = [[1, 2, 3, 4], [5, 6]]
    noises = [study.noise([1, 2], seeds=2), study.noise(0, seeds=3)]
    grids = study.patch_grids(model, texts, noises, METRIC)
    for grid, text, own in zip(grids, texts, noises, strict=True):
        alone = study.patch_grid(model, text, own, METRIC)
        assert grid.values == pytest.approx(alone.values, abs=1e-6)
        assert grid.corrupted == pytest.approx(alone.corrupted, abs=1e-6)


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_the_deviation_is_of_the_whole_embedding(scheme, monkeypatch):
    monkeypatch.setattr("llama_ref.study.patching.noise.EMBEDDED_ROWS", 7)
    model = random_model(ARGS, seed=0)
    expected = model.tok_embeddings.weight.std(correction=0).item()
    if scheme:
        quantize_model(model, scheme)
    assert embedding_deviation(model) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: study.noise([]), r"positions is \[\], expected a whole number or a list"),
        (lambda: study.noise([1.5]), r"positions is \[1.5\], expected"),
        (lambda: study.noise(1, seeds=0), "seeds is range.*at least one"),
        (lambda: study.noise(1, seeds=True), "seeds is True"),
        (lambda: study.noise(1, scale=0), "scale is 0, expected a number above 0"),
        (lambda: study.noise(1, scale=float("nan")), "scale is nan"),
        (lambda: run([1, 2], study.noise(2)), "a position of the noise is 2, expected a whole number from 0 to 1"),
        (lambda: run([[1, 2], [3, 4]], [study.noise(1), [3, 4]]), "both texts and noise"),
        (lambda: run([[1, 2], [3, 4]], [study.noise(1)]), "corrupted has 1 values, expected one for each of the 2"),
    ],
)
def test_noise_that_cannot_be_is_refused(make, message):
    with pytest.raises(RequestError, match=message):
        make()


def run(clean, corrupted):
    study.patch_grids(random_model(ARGS, seed=0), clean, corrupted, METRIC)
