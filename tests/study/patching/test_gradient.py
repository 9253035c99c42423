"""Attribution patching, compared with gradients of a transformer in plain PyTorch, and with exact patching."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ref import study
from llama_ref.args import ModelArgs
from llama_ref.errors import RequestError
from llama_ref.quantization.apply import quantize_model
from random_models import random_model
from study.patched import ARGS, RAGGED, ids
from study.plain_model import Plain

METRIC = study.logit_difference(3, 4)


def by_hand(model, clean, corrupted, name, shares):
    """(clean − corrupted) · mean gradient, for every layer: (layers, T, …)."""
    ends = [F.embedding(torch.tensor(text), model.tok_embeddings.weight) for text in (clean, corrupted)]
    runs = [Plain(model, end) for end in ends]
    total = 0
    for share in shares:
        plain = Plain(model, (ends[1] + share * (ends[0] - ends[1])).requires_grad_())
        kept = [plain.kept[i, name] for i in range(model.args.n_layers)]
        total = total + torch.stack(torch.autograd.grad(METRIC(plain.logits[None]).sum(), kept)) / len(shares)
    values = [torch.stack([run.kept[i, name] for i in range(model.args.n_layers)]) for run in runs]
    return (values[0] - values[1]) * total, METRIC(runs[1].logits[None]).item()


@settings(max_examples=12, deadline=None)
@given(
    groups=st.integers(1, 3), kv_heads=st.integers(1, 2), layers=st.integers(1, 3), length=st.integers(1, 6),
    scaled=st.booleans(), tied=st.booleans(), steps=st.sampled_from([None, 1, 3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_estimates_are_the_gradients_of_a_plain_transformer(groups, kv_heads, layers, length, scaled, tied, steps, seed):
    heads = groups * kv_heads
    args = ModelArgs.from_dict(
        {"dim": 8 * heads, "n_layers": layers, "n_heads": heads, "n_kv_heads": kv_heads, "vocab_size": 30}
        | {"multiple_of": 16, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": scaled}
    )
    model = random_model(args, seed=seed, tied=tied)
    clean, corrupted = (
        torch.randint(30, (length,), generator=torch.Generator().manual_seed(seed + i)).tolist() for i in (1, 2)
    )
    shares = [0.0] if steps is None else [(i + 0.5) / steps for i in range(steps)]
    for over, name, dims in (
        ("layer×position", "residual_pre", (-1,)),
        ("layer×head", "attention.head_output", (1, -1)),
        ("layer×position×head", "attention.head_output", (-1,)),
    ):
        grid = study.attribution_patch(model, clean, corrupted, METRIC, over, steps=steps)
        effects, baseline = by_hand(model, clean, corrupted, name, shares)
        assert grid.values == pytest.approx(baseline + effects.sum(dims).numpy(), abs=2e-3)
        assert grid.corrupted == pytest.approx(baseline, abs=1e-3)


def test_a_linear_metric_of_what_is_read_linearly_is_exact():
    """The last value vectors reach the logits through wo and, with the norm held fixed, linearly."""
    model = random_model(ARGS, seed=0)
    model.layers[-1].feed_forward.w2.weight.zero_()
    norm, fixed = model.norm, model.norm.weight.clone()

    class Scaled(torch.nn.Module):
        eps, weight = norm.eps, norm.weight

        def forward(self, x):
            return x * fixed

    model.norm = Scaled()
    clean, corrupted = ids(1, 5), ids(1, 5, seed=1)
    for name, over in (("attention.head_output", "layer×position×head"), ("residual_post", "layer×position")):
        exact = study.patch_grid(model, clean, corrupted, METRIC, over, name)
        estimate = study.attribution_patch(model, clean, corrupted, METRIC, over, name)
        assert estimate.values[-1] == pytest.approx(exact.values[-1], abs=1e-4)
        assert (estimate.clean, estimate.corrupted) == (exact.clean, exact.corrupted)


@pytest.mark.parametrize("name", ["residual_pre", "attention.v", "ffn.output", "attention.scores", "attention.head_result"])
def test_along_an_activation_estimates_add_up_to_the_patched_layer(name):
    model = random_model(ARGS, seed=0)
    clean, corrupted = ids(1, 5), ids(1, 5, seed=1)
    grid = study.attribution_patch(model, clean, corrupted, METRIC, name=name, steps=32, along="activation")
    source = study.trace(model, clean)
    for layer in range(3):
        with study.patch(model, {f"layers.{layer}.{name}": study.swap_from(source)}):
            whole = METRIC(model(corrupted)[:, -1]).item()
        assert (grid.values[layer] - grid.corrupted).sum() == pytest.approx(whole - grid.corrupted, abs=0.01)


def test_along_inputs_the_embeddings_estimates_add_up_to_the_gap():
    model = random_model(ARGS, seed=0)
    grid = study.attribution_patch(model, ids(1, 5), ids(1, 5, seed=1), METRIC, steps=32)
    assert (grid.values[0] - grid.corrupted).sum() == pytest.approx(grid.clean - grid.corrupted, abs=0.01)
    short = study.attribution_patch(model, ids(1, 5), ids(1, 5, seed=1), METRIC, steps=32, along="activation")
    assert short.values[0] == pytest.approx(grid.values[0], abs=1e-3)


@pytest.mark.parametrize("along", ["inputs", "activation"])
@pytest.mark.parametrize("pass_tokens", [1024, 9])
@pytest.mark.parametrize("over", ["layer×position", "layer×head"])
def test_several_pairs_are_each_pairs_own(monkeypatch, along, pass_tokens, over):
    monkeypatch.setattr("llama_ref.study.passes.pass_size.PASS_TOKENS", pass_tokens)
    model = random_model(ARGS, seed=0)
    noises = [study.noise(0, seeds=2), study.noise(1, seeds=1), study.noise([0, -1], seeds=2)]
    metrics = [study.probability(7), study.probability(8), METRIC]
    for corrupted in ([[50 - id for id in text] for text in RAGGED], noises):
        calls: list[tuple[int, int]] = []

        def called(done, total, calls=calls):
            calls.append((done, total))

        grids = study.attribution_patches(model, RAGGED, corrupted, metrics, over, steps=2, along=along, progress=called)
        assert calls[-1][0] == calls[-1][1]
        for grid, *pair in zip(grids, RAGGED, corrupted, metrics, strict=True):
            alone = study.attribution_patch(model, *pair, over, steps=2, along=along)
            assert grid.values == pytest.approx(alone.values, abs=1e-4)
            assert (grid.clean, grid.corrupted) == pytest.approx((alone.clean, alone.corrupted), abs=1e-5)


def test_a_quantized_model_is_estimated_by_its_own_weights():
    model = random_model(ARGS, seed=0)
    quantize_model(model, "int8")
    exact = study.patch_grid(model, ids(1, 5), ids(1, 5, seed=1), METRIC, name="residual_post")
    found = study.attribution_patch(
        model, ids(1, 5), ids(1, 5, seed=1), METRIC, name="residual_post", steps=32, along="activation"
    )
    assert found.values[-1] == pytest.approx(exact.values[-1], abs=0.05)


def test_estimates_of_the_demo_rank_heads_as_exact_patching_does(llama):
    """In "When Mary and John …" one gradient finds the heads that name the right person."""
    clean, corrupted = (
        llama.encode(f"When Mary and John went to the store, {giver} gave a drink to") for giver in ("John", "Mary")
    )
    metric = study.logit_difference(*(llama.encode(name)[-1] for name in (" Mary", " John")))
    estimate = study.attribution_patch(llama.model, clean, corrupted, metric, "layer×head")
    top = [tuple(int(i) for i in np.unravel_index(i, estimate.values.shape)) for i in estimate.values.ravel().argsort()[::-1]]
    assert (23, 3) in top[:3] and {(29, 1), (20, 0)} <= set(top[:12])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0, expected a whole number from 1"),
        ({"steps": True}, "steps is True"),
        ({"along": "x"}, "along is 'x', expected inputs or activation"),
        ({"metric": lambda logits: logits.argmax(-1)}, "the metric's result has no gradient"),
        ({"metric": lambda logits: logits.detach()[:, 0], "along": "activation"}, "has no gradient"),
        ({"corrupted": [1, 2, 3]}, "of the same length"),
    ],
)
def test_estimates_that_cannot_be_are_refused(options, message):
    given = {"clean": [1, 2], "corrupted": [1, 3], "metric": METRIC} | options
    with pytest.raises(RequestError, match=message):
        study.attribution_patch(random_model(ARGS, seed=0), **given)


def test_agreement_is_pearsons_correlation():
    def grid(values):
        return study.Grid(np.array([values], "float32"), ("layer", "head"), ([], []), "x", 1, 0)

    found = grid([1, 2, 4]).agreement(grid([1, 3, 2]))
    assert found.correlation == pytest.approx(np.corrcoef([1, 2, 4], [1, 3, 2])[0, 1])
    assert found.largest_difference == 2
    assert np.isnan(grid([0, 0, 0]).agreement(grid([1, 2, 4])).correlation)
    with pytest.raises(RequestError, match="of the same cells"):
        grid([1, 2, 3]).agreement(grid([1, 2]))


@pytest.mark.parametrize("steps", [None, 2])
def test_grids_that_share_their_passes_are_those_of_each(steps):
    model = random_model(ARGS, seed=0)
    clean, corrupted = ids(1, 5), ids(1, 5, seed=1)
    over = ["layer×position", "layer×head", "layer×position×head"]
    for together, each in zip(study.attribution_grids(model, clean, corrupted, METRIC, over, steps=steps), over, strict=True):
        alone = study.attribution_patch(model, clean, corrupted, METRIC, each, steps=steps)
        assert together.values == pytest.approx(alone.values, abs=1e-6)
        assert (together.axes, together.clean, together.corrupted) == (alone.axes, alone.clean, alone.corrupted)
    with pytest.raises(RequestError, match="over is 'layer×head', expected a list"):
        study.attribution_grids(model, clean, corrupted, METRIC, "layer×head")
