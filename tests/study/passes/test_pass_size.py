"""How many tokens run together: the estimate is an upper bound of a pass's memory, and not far above it."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bounds import fused_attention, peak_bytes
from llama_ref import study
from llama_ref.args import ModelArgs
from llama_ref.study.passes import pass_size
from random_models import random_model

SHAPE = {"n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5, "rope_theta": 5e5}


@fused_attention
@pytest.mark.parametrize("name", ["residual_pre", "attention.pattern", "attention.head_result"])
@pytest.mark.parametrize(("dim", "vocab_size", "T", "dtype"), [(64, 5000, 8, torch.float32), (64, 60, 100, torch.bfloat16)])
def test_the_estimate_bounds_the_peak(name, dim, vocab_size, T, dtype):
    model = random_model(ModelArgs.from_dict(SHAPE | {"dim": dim, "vocab_size": vocab_size}), seed=0).to(dtype)
    text = torch.randint(vocab_size, (512 // T, T))

    def patched():
        with torch.no_grad(), study.patch(model, {f"layers.1.{name}": lambda value: value.mul_(2)}):
            model.logits(model.hidden(text)[:, -1]).softmax(-1)

    def gradients():
        traced = study.trace(model, text, [f"layers.*.{name}", "norm"], requires_grad=True)
        probability = model.logits(traced["norm"][:, -1]).softmax(-1)[:, 3].sum()
        torch.autograd.grad(probability, [traced[key] for key in traced if key != "norm"])

    for run, with_gradients in ((patched, False), (gradients, True)):
        estimate = text.numel() * pass_size.bytes_per_token(model, name, T, gradients=with_gradients)
        assert 0.15 * estimate < peak_bytes(run) < estimate


def test_a_pass_takes_half_of_the_free_memory_at_most(monkeypatch):
    model = random_model(ModelArgs.from_dict(SHAPE | {"dim": 64, "vocab_size": 60}), seed=0)
    each = pass_size.bytes_per_token(model, "residual_pre", 10)
    for free, expected in ((200 * each, 100), (each, 1), (1 << 50, 1024), (None, 1024)):
        monkeypatch.setattr(pass_size, "free_bytes", lambda device, free=free: free)
        assert pass_size.tokens_that_fit(model, "residual_pre", 10) == expected


def test_free_memory_is_less_than_all_of_it():
    free = pass_size.free_bytes(torch.device("cpu"))
    assert free is None or 0 < free < 1 << 50


@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(1, 400))
def test_passes_have_all_texts_once_and_are_bounded(lengths, most):
    passes = list(pass_size.split_passes(lengths, most))
    assert [i for own in passes for i in own] == list(range(len(lengths)))
    for own in passes:
        assert len(own) * max(lengths[i] for i in own) <= most or len(own) == 1


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(60, 400))
def test_no_other_passes_take_less(lengths, most):
    def taken(passes: list[range]) -> float:
        held = [len(own) * max(lengths[i] for i in own) for own in passes]
        return sum(held) + pass_size.EACH_PASS * len(held) if max(held) <= most else math.inf

    n = len(lengths)
    inner = [cut for k in range(n) for cut in itertools.combinations(range(1, n), k)]
    possible = [[range(*pair) for pair in itertools.pairwise((0, *cut, n))] for cut in inner]
    assert taken(list(pass_size.split_passes(lengths, most))) == min(map(taken, possible))


def test_sorted_texts_are_padded_little():
    lengths = sorted((1 + i * 37 % 200 for i in range(400)), reverse=True)
    held = sum(len(own) * lengths[own.start] for own in pass_size.split_passes(lengths))
    assert sum(lengths) <= held < 1.1 * sum(lengths)


def test_passes_are_filled_in_order():
    assert list(pass_size.split_passes([5, 5, 2, 9, 1], 10)) == [range(2), range(2, 3), range(3, 4), range(4, 5)]
    assert list(pass_size.split_passes([5, 5], None)) == [range(2)]
