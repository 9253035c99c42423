"""Attention knockout, compared with masked attention in plain PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ref import study
from llama_ref.errors import RequestError
from llama_ref.kv_cache import KVCache
from random_models import grouped_model
from study.circuits.plain import forward

METRIC = study.probability(3)


@pytest.fixture(scope="module")
def model():
    return grouped_model(layers=3)


def masked(model, ids, queries, keys, layers, heads):
    """Logits after the last token with an attention mask; a head with no keys left adds nothing."""

    def hook(name, value):
        layer, _, part = name.partition(".")
        if part == "scores" and int(layer) in layers:
            for head in heads:
                for query in queries:
                    value[head, query, keys] = -torch.inf
        return value.nan_to_num(0) if part == "heads" else value

    return forward(model, ids, hook)


@settings(max_examples=15, deadline=None)
@given(
    groups=st.integers(1, 3), kv_heads=st.integers(1, 2), layers=st.integers(1, 3), scaled=st.booleans(),
    tied=st.booleans(), length=st.integers(1, 6), data=st.data(),
)  # fmt: skip
def test_a_cut_is_a_mask(groups, kv_heads, layers, scaled, tied, length, data):
    model = grouped_model(groups, kv_heads, layers, scaled=scaled, tied=tied)
    ids = data.draw(st.lists(st.integers(0, 29), min_size=length, max_size=length))
    queries, keys = (data.draw(st.lists(st.integers(0, length - 1), max_size=3)) for _ in "qk")
    chosen = data.draw(st.lists(st.integers(0, layers - 1), max_size=2))
    heads = data.draw(st.lists(st.integers(0, groups * kv_heads - 1), max_size=3))
    before = model(torch.tensor([ids]))
    with study.cut(model, queries=queries, keys=keys, layers=chosen, heads=heads):
        found = model(torch.tensor([ids]))[0, -1]
    torch.testing.assert_close(found, masked(model, ids, queries, keys, chosen, heads), atol=1e-4, rtol=1e-4)
    assert torch.equal(model(torch.tensor([ids])), before)


def test_what_is_left_out_means_all(model):
    ids = [1, 2, 3, 4, 5]
    with study.cut(model, keys=0):
        found = model(torch.tensor([ids]))[0, -1]
    torch.testing.assert_close(found, masked(model, ids, range(5), [0], range(3), range(4)), atol=1e-4, rtol=1e-4)
    with study.cut(model), study.recording(model, "layers.*.attention.output") as seen:
        model(torch.tensor([ids]))
    assert not any(value.any() for value in seen.trace.values())


def test_a_cut_acts_in_generation(model):
    """With a cache, token by token, the same keys are hidden from the same queries, and logits equal those of one pass."""
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with study.cut(model, queries=[3, 4], keys=[1, 2]):
        whole = model(ids)
        cache = KVCache(model.args, 1, 8, dtype=model.dtype)
        steps = torch.cat([model(ids[:, i : i + 1], cache) for i in range(5)], 1)
    torch.testing.assert_close(steps, whole, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole, model(ids), atol=1e-3)


def test_negative_positions_count_from_each_texts_end(model):
    texts = [[1, 2, 3, 4, 5], [6, 7, 8]]
    with study.cut(model, queries=-1, keys=-2):
        both = study.trace(model, texts, "layers.2.attention.pattern")
    for row, text in enumerate(texts):
        with study.cut(model, queries=len(text) - 1, keys=len(text) - 2):
            alone = study.trace(model, text, "layers.2.attention.pattern")
        torch.testing.assert_close(
            both.row(row)["layers.2.attention.pattern"], alone["layers.2.attention.pattern"], atol=1e-5, rtol=1e-4
        )
        assert both.row(row)["layers.2.attention.pattern"][0, :, -1, -2].eq(0).all()


@pytest.mark.parametrize("width", [1, 2, 3, 9])
def test_windows_are_cuts_one_by_one(model, width):
    texts, keys = [[1, 2, 3, 4, 5], [6, 7, 8], [2, 4, 9]], [[1, 2], [0], [1]]
    found = study.cut_windows(model, texts, METRIC, queries=-1, keys=keys, width=width, heads=[0, 1])
    for layer, window in enumerate(found.windows):
        assert list(window) == [i for i in range(layer - width // 2, layer - width // 2 + width) if 0 <= i < 3]
        for i, text in enumerate(texts):
            with study.cut(model, queries=-1, keys=keys[i], layers=window, heads=[0, 1]):
                expected = METRIC(model(torch.tensor([text]))[:, -1])
            torch.testing.assert_close(found.values[layer, i], expected[0], atol=1e-6, rtol=1e-4)
    expected = torch.cat([METRIC(model(torch.tensor([text]))[:, -1]) for text in texts])
    torch.testing.assert_close(found.whole, expected)
    changes = (found.values / expected - 1).numpy()
    assert found.relative.numpy() == pytest.approx(changes.mean(1), abs=1e-6)
    assert found.standard_error.numpy() == pytest.approx(changes.std(1, ddof=1) / 3**0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"layers": 3}, "layer is 3, expected a whole number from 0 to 2"),
        ({"heads": [4]}, "head is 4, expected a whole number from 0 to 3"),
        ({"queries": "last"}, "queries is 'last', expected a whole number"),
        ({"keys": [True]}, r"keys is \[True\]"),
        ({"keys": 5}, "cannot cut keys at position 5: the text has positions 0 to 4"),
    ],
)
def test_what_a_model_or_text_lacks_is_refused(model, asked, error):
    with pytest.raises(RequestError, match=error), study.cut(model, **asked):
        model(torch.tensor([[1, 2, 3, 4, 5]]))


def test_windows_refuse_what_does_not_fit(model):
    with pytest.raises(RequestError, match="width is 0, expected a number of layers"):
        study.cut_windows(model, [1, 2], METRIC, queries=-1, keys=0, width=0)
    with pytest.raises(RequestError, match="keys has 1 values, expected one for each of the 2 texts"):
        study.cut_windows(model, [[1, 2], [3, 4]], METRIC, queries=-1, keys=[[0]])
