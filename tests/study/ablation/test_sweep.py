"""Ablation sweeps, compared with a transformer in plain PyTorch with hooks; units compared with single runs."""

import itertools
import re

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
from llama_ref.study.ablation.parts import check_disjoint, draw_parts, named_part
from random_models import grouped_model, random_model
from study.circuits.plain import all_logits

TEXTS = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 1, 9, 1]]
KINDS = ("heads", "kv_groups", "attention", "feed_forward", "layers", "units")


@pytest.fixture(scope="module")
def model():
    return grouped_model()


def losses(model, texts, hook=lambda name, value: value):
    return [F.cross_entropy(all_logits(model, text, hook)[:-1], torch.tensor(text[1:])).item() for text in texts]


def pool(model, texts, name):
    """An activation at all tokens of all texts."""
    found = []
    for text in texts:
        all_logits(model, text, lambda own, value: (found.append(value) if own == name else None, value)[1])
    return torch.cat(found)


def without(model, texts, part, replacement):
    """Losses with the columns of a part's activations replaced."""
    words = part.split(".")
    layer, kind = words[1], words[2] if len(words) > 2 else "layer"
    group = model.args.n_heads // model.args.n_kv_heads
    index = int(words[3]) if len(words) > 3 else 0
    where = {
        "heads": {f"{layer}.heads": [index]},
        "groups": {f"{layer}.heads": list(range(index * group, (index + 1) * group))},
        "attention": {f"{layer}.attention": None},
        "ffn": {f"{layer}.ffn": None},
        "layer": {f"{layer}.attention": None, f"{layer}.ffn": None},
        "units": {f"{layer}.hidden": [index]},
    }[kind]
    pools = {name: pool(model, texts, name) for name in where}

    def hook(name, value):
        if name not in where:
            return value
        value, new = value.clone(), replacement(pools[name]).expand_as(value)
        columns = slice(None) if where[name] is None else where[name]
        value[:, columns] = new[:, columns]
        return value

    return losses(model, texts, hook)


EDITS = {
    "mean": (study.mean(), lambda values: values.mean(0)),
    "zero": (study.zero(), lambda values: torch.zeros_like(values[0])),
    "default": (None, lambda values: values.mean(0)),
}


@settings(max_examples=6, deadline=None)
@given(
    groups=st.integers(1, 3), kv_heads=st.integers(1, 2), layers=st.integers(1, 2), scaled=st.booleans(),
    tied=st.booleans(), over=st.sampled_from(KINDS), edit=st.sampled_from(list(EDITS)), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_sweep_is_a_loop_of_hooks(groups, kv_heads, layers, scaled, tied, over, edit, seed):
    model = grouped_model(groups, kv_heads, layers, scaled=scaled, tied=tied, seed=seed)
    given_edit, replacement = EDITS[edit]
    found = study.sweep(model, TEXTS, over, given_edit, n_exact=5)
    expected = torch.tensor([without(model, TEXTS, part, replacement) for part in found.parts])
    torch.testing.assert_close(found.losses, expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(found.whole, torch.tensor(losses(model, TEXTS)), atol=1e-4, rtol=1e-4)


def test_statistics_are_over_texts(model):
    found = study.sweep(model, TEXTS, "heads")
    changes = (found.losses - found.whole).numpy()
    assert found.mean.numpy() == pytest.approx(changes.mean(1), abs=1e-6)
    assert found.standard_error.numpy() == pytest.approx(changes.std(1, ddof=1) / 3**0.5, abs=1e-6)
    top = found.top()
    assert [mean for _, mean, _ in top] == sorted(found.mean.tolist(), reverse=True) and len(top) == 8
    assert found.top(2) == top[:2] and top[0][0] == found.parts[int(found.mean.argmax())]
    assert study.sweep(model, TEXTS[0], "layers").standard_error.isnan().all()


def test_passes_may_be_small_and_leave_nothing_behind(model, monkeypatch):
    before = model(torch.tensor(TEXTS[:1]))
    edits = [study.resample(), study.mean(), study.zero().at(positions=-1)]
    whole = [study.sweep(model, TEXTS, over, edit) for over in ("kv_groups", "units") for edit in edits]
    monkeypatch.setattr("llama_ref.study.ablation.sweep.tokens_that_fit", lambda *args: 1)
    for i, over in enumerate(("kv_groups", "units")):
        for each, edit in zip(whole[3 * i :], edits, strict=False):
            small = study.sweep(model, TEXTS, over, edit)
            torch.testing.assert_close((small.whole, small.losses), (each.whole, each.losses))
    assert torch.equal(model(torch.tensor(TEXTS[:1])), before)


def test_units_are_estimated_by_gradients_and_the_largest_are_run(model):
    """The estimate is the derivative of the loss by the applied share of the edit."""
    found = study.sweep(model, TEXTS, "units", study.zero(), n_exact=6, controls=4)
    order = found.estimated.flatten().abs().argsort(descending=True)[:6]
    F_ = model.args.ffn_dim
    assert sorted(found.parts) == sorted(f"layers.{i // F_}.units.{i % F_}" for i in order.tolist())
    layer, unit = divmod(int(order[0]), F_)

    def scaled(name, value):
        if name != f"{layer}.hidden":
            return value
        value = value.clone()
        value[:, unit] *= 1 - 1e-2
        return value

    slope = (np.mean(losses(model, TEXTS, scaled)) - np.mean(losses(model, TEXTS))) / 1e-2
    assert found.estimated[layer, unit].item() == pytest.approx(slope, rel=0.05)
    assert len(found.controls.parts) == 4 and not set(found.controls.parts) & set(found.parts)
    assert found.controls.mean.abs().mean() < found.mean.abs().mean()


def test_an_edit_may_be_a_function_and_act_at_positions_in_units_too(model):
    def last(value):
        return torch.cat([value[:, :-1], 0 * value[:, -1:]], 1)

    found, same = (study.sweep(model, TEXTS[0], "units", edit) for edit in (last, study.zero().at(positions=-1)))
    assert found.parts == same.parts and torch.equal(found.losses, same.losses)
    torch.testing.assert_close(found.estimated, same.estimated)


def test_resampled_values_are_those_of_other_tokens(model):
    with study.patch(model, {"layers.1.ffn.output": study.resample(3)}):
        found = study.trace(model, TEXTS, ["layers.1.ffn.output"])
    own = study.trace(model, TEXTS, "layers.1.ffn.output")["layers.1.ffn.output"]
    values = torch.cat([own[row, : len(text)] for row, text in enumerate(TEXTS)])
    for row, text in enumerate(TEXTS):
        for token in found["layers.1.ffn.output"][row, : len(text)]:
            assert (values == token).all(-1).any()
    one = study.sweep(model, TEXTS, "layers", study.resample(1))
    assert torch.equal(one.losses, study.sweep(model, TEXTS, "layers", study.resample(1)).losses)
    assert not torch.equal(one.losses, study.sweep(model, TEXTS, "layers", study.resample(2)).losses)


def test_parts_together_beside_random_others(model):
    alone = study.sweep(model, TEXTS, "heads")
    one = study.ablate_together(model, TEXTS, "layers.1.heads.2")
    torch.testing.assert_close(one.losses, alone.losses[alone.parts.index("layers.1.heads.2")])
    both = study.ablate_together(model, TEXTS, ["layers.0.attention", "layers.1.units.3", "layers.0.units.1"], study.zero())

    def hook(name, value):
        value = value.clone()
        if name in ("0.attention", "1.hidden", "0.hidden"):
            value[:, {"0.attention": slice(None), "1.hidden": 3, "0.hidden": 1}[name]] = 0
        return value

    torch.testing.assert_close(both.losses, torch.tensor(losses(model, TEXTS, hook)), atol=1e-4, rtol=1e-4)
    assert both.mean == pytest.approx((both.losses - both.whole).mean().item()) and both.controls.shape == (0, 3)
    drawn = study.ablate_together(model, TEXTS, ["layers.1.heads.2", "layers.0.heads.0"], controls=3)
    assert drawn.controls.shape == (3, 3) and len(drawn.control_means) == 3
    again = study.ablate_together(model, TEXTS, ["layers.1.heads.2", "layers.0.heads.0"], controls=3)
    assert torch.equal(drawn.controls, again.controls)
    only = study.ablate_together(model, TEXTS, "layers.1.ffn", controls=1)  # the model has one other feed-forward
    other = study.ablate_together(model, TEXTS, "layers.0.ffn")
    torch.testing.assert_close(only.controls[0], other.losses)


PARTS_OF_LAYER_0 = {  # the heads and units that each part contains, of four heads in two groups
    "layers.0": ({0, 1, 2, 3}, {0, 1}),
    "layers.0.attention": ({0, 1, 2, 3}, set()),
    "layers.0.ffn": (set(), {0, 1}),
    "layers.0.groups.0": ({0, 1}, set()),
    "layers.0.groups.1": ({2, 3}, set()),
    "layers.0.heads.1": ({1}, set()),
    "layers.0.heads.2": ({2}, set()),
    "layers.0.units.0": (set(), {0}),
    "layers.0.units.1": (set(), {1}),
    "layers.1": (set(), set()),
}


@pytest.mark.parametrize(("first", "second"), itertools.permutations(PARTS_OF_LAYER_0, 2))
def test_a_head_or_unit_is_left_out_once(model, first, second):
    """An edit that halves a value would quarter it if two parts applied it."""
    shared = [a & b for a, b in zip(PARTS_OF_LAYER_0[first], PARTS_OF_LAYER_0[second], strict=True)]
    if any(shared):
        with pytest.raises(RequestError, match=f"^{re.escape(first)} and {re.escape(second)} overlap: what both contain can"):
            study.ablate_together(model, TEXTS, [first, second], study.scale(0.5))
        return
    both = study.ablate_together(model, TEXTS, [first, second], study.scale(0.5))
    assert both.parts == [first, second]


@pytest.mark.parametrize(
    "names",
    [
        ["layers.0.groups.0", "layers.1.heads.0", "layers.1.heads.3"],
        ["layers.0", "layers.1.attention", "layers.2.ffn", "layers.2.heads.1", "layers.1.units.3"],
        ["layers.2.heads.0", "layers.2.heads.1", "layers.2.heads.2", "layers.3", "layers.2.units.0"],
    ],
)
def test_controls_overlap_nothing(names):
    args = grouped_model(layers=5).args
    chosen = [named_part(args, name) for name in names]
    sets = draw_parts(args, chosen, 20, 0)
    for drawn in sets:
        assert sorted(part.over for part in drawn) == sorted(part.over for part in chosen)
        check_disjoint([*chosen, *drawn])
    assert len({tuple(part.name for part in drawn) for drawn in sets}) > 10


def test_controls_that_only_just_fit_are_found():
    args = grouped_model(layers=2).args
    chosen = [named_part(args, f"layers.0.{name}") for name in ("groups.0", "heads.2", "heads.3")]
    for drawn in draw_parts(args, chosen, 10, 0):
        check_disjoint([*chosen, *drawn])
    more = [*chosen, named_part(args, "layers.1.heads.0")]
    with pytest.raises(RequestError, match="the parts leave 1 other heads to draw 3 controls from: choose fewer"):
        draw_parts(args, more, 1, 0)


def test_quantized_models_are_swept():
    args = ModelArgs.from_dict(
        {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 30, "multiple_of": 32, "norm_eps": 1e-5}
        | {"rope_theta": 500000.0}
    )
    whole, model = random_model(args, seed=0), random_model(args, seed=0)
    quantize_model(model, "int8")
    expected = study.sweep(whole, TEXTS, "units", n_exact=4)
    found = study.sweep(model, TEXTS, "units", n_exact=4)
    assert np.corrcoef(found.estimated.flatten(), expected.estimated.flatten())[0, 1] > 0.95


def test_units_that_tell_texts_apart():
    model = grouped_model(layers=2)
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.randint(a, a + 2, (8, 6), generator=generator).tolist() for a in (0, 15))
    found = study.contrast_units(model, low, high)
    name, t, held_out = found.top(1)[0]
    _, layer, _, unit = name.split(".")
    values = [
        np.array([pool(model, [text], f"{layer}.hidden")[:, int(unit)].mean() for text in texts]) for texts in (low, high)
    ]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).numpy()
    for found_t, half in ((t, order[::2]), (held_out, order[1::2])):
        ours, theirs = (each[half] for each in values)
        expected = (ours.mean() - theirs.mean()) / np.sqrt(ours.var(ddof=1) / 4 + theirs.var(ddof=1) / 4)
        assert found_t == pytest.approx(expected, rel=1e-3)
    assert np.sign(held_out) == np.sign(t) and abs(held_out) > 2
    last = study.contrast_units(model, low, low, at="last")
    assert not last.difference.any() and not last.t.any()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: study.sweep(m, TEXTS, "neurons"), "over is 'neurons', expected heads, kv_groups"),
        (lambda m: study.sweep(m, [[1, 2], [3]]), "text 1 has one token, expected two or more"),
        (lambda m: study.sweep(m, TEXTS, "units", n_exact=0), "n_exact is 0, expected a whole number from 1"),
        (lambda m: study.ablate_together(m, TEXTS, "layers.0.heads.4"), "no part is called 'layers.0.heads.4'; names are"),
        (lambda m: study.ablate_together(m, TEXTS, "layers.0.mlp"), "no part is called 'layers.0.mlp'"),
        (
            lambda m: study.ablate_together(m, TEXTS, ["layers.0", "layers.1"], controls=1),
            "the parts leave 0 other layers to draw 2",
        ),
        (lambda m: study.ablate_together(m, TEXTS, []), "parts is .., expected the name of one, such as layers.0.ffn"),
        (lambda m: study.ablate_together(m, TEXTS, ["layers.0"] * 2), "parts has 'layers.0' twice"),
        (lambda m: study.sweep(m, TEXTS, "heads", 0), "an edit is 0, expected a function of a tensor"),
        (lambda m: study.contrast_units(m, TEXTS, TEXTS), "texts has 3 texts, expected four or more"),
        (lambda m: study.contrast_units(m, TEXTS, TEXTS, at="first"), "at is 'first', expected mean or last"),
        (lambda m: study.resample("a"), "seed is 'a', expected a whole number"),
        (lambda m: study.resample(1 << 63), "seed is 9223372036854775808, expected a number of at most 62 bits"),
    ],
)
def test_what_does_not_fit_is_refused(model, call, error):
    with pytest.raises(RequestError, match=error):
        call(model)


def test_scores_cannot_be_resampled(model):
    edits = {"layers.0.attention.scores": study.resample()}
    with study.patch(model, edits), pytest.raises(RequestError, match="cannot be resampled"):
        model(torch.tensor(TEXTS[:1]))
