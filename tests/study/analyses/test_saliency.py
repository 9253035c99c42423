"""Saliency, compared with gradients of a transformer in plain PyTorch."""

import importlib

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
from study.pictured import random_vision_model
from study.plain_model import Plain

ARGS = {"dim": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 30, "multiple_of": 16}
ARGS |= {"norm_eps": 1e-5, "rope_theta": 500000.0}


def measured(model, embedded, answer, other, of):
    """The mean measure over an answer's tokens, each predicted from the text before it: (L, D) -> ()."""
    total = 0
    for i, token in enumerate(answer):
        logits = Plain(model, embedded[: len(embedded) - len(answer) + 1 + i]).logits
        scores = logits if of == "logit" else logits.log_softmax(-1)
        total = total + scores[token] - (0 if other is None else scores[other])
    return total / len(answer)


@settings(max_examples=8, deadline=None)
@given(
    groups=st.integers(1, 2), kv_heads=st.integers(1, 2), layers=st.integers(1, 2), length=st.integers(1, 5),
    answer=st.integers(1, 3), tied=st.booleans(), of=st.sampled_from(["logit", "log_probability"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_shares_are_the_gradients_of_a_plain_transformer(groups, kv_heads, layers, length, answer, tied, of, seed):
    heads = groups * kv_heads
    shape = {"dim": 8 * heads, "n_layers": layers, "n_heads": heads, "n_kv_heads": kv_heads, "vocab_size": 30}
    model = random_model(ModelArgs.from_dict(ARGS | shape), seed=seed, tied=tied)
    ids = torch.randint(30, (length + answer,), generator=torch.Generator().manual_seed(seed)).tolist()
    prompt, wanted = ids[:length], ids[length:]
    other = 7 if answer == 1 and of == "logit" else None
    table = model.tok_embeddings.weight
    end = F.embedding(torch.tensor(ids[:-1]), table)
    moved = sorted({0, length - 1})
    begin = end.clone()
    begin[moved] = table.mean(0)

    def gradient(at):
        at = at.clone().requires_grad_()
        return torch.autograd.grad(measured(model, at, wanted, other, of), at)[0][:length]

    def found(method, **options):
        target = wanted[0] if answer == 1 else wanted
        return study.saliency(model, prompt, target, other, method=method, of=of, positions=moved, **options)

    def only_moved(shares):
        return torch.stack([share if i in moved else torch.zeros(()) for i, share in enumerate(shares)])

    one = gradient(end)
    torch.testing.assert_close(found("gradient").shares, only_moved(one.norm(dim=-1)), atol=1e-4, rtol=1e-3)
    product = found("gradient×input")
    torch.testing.assert_close(product.shares, only_moved((one * end[:length]).sum(-1)), atol=1e-4, rtol=1e-3)
    assert product.missing is product.baseline_value is None
    rule = zip(*map(np.ndarray.tolist, np.polynomial.legendre.leggauss(3)), strict=True)
    mean = sum(w / 2 * gradient(begin + (1 + x) / 2 * (end - begin)) for x, w in rule)
    integrated = found("integrated", steps=3)
    torch.testing.assert_close(integrated.shares, ((end - begin)[:length] * mean).sum(-1), atol=1e-4, rtol=1e-3)
    ends = [measured(model, x, wanted, other, of).item() for x in (begin, end)]
    assert (integrated.baseline_value, integrated.value) == pytest.approx(tuple(ends), abs=1e-4)
    assert integrated.missing == pytest.approx(ends[1] - ends[0] - integrated.shares.sum().item(), abs=1e-3)


@pytest.fixture(scope="module")
def model():
    return random_model(ModelArgs.from_dict(ARGS), seed=0)


@pytest.mark.parametrize("baseline", ["mean", 5, torch.full((ARGS["dim"],), 0.3)])
def test_shares_add_up_to_the_difference(model, baseline):
    few, many = (study.saliency(model, [3, 1, 4], 2, steps=steps, baseline=baseline) for steps in (1, 64))
    assert abs(many.missing) < 1e-3 < abs(many.value - many.baseline_value)
    assert abs(few.missing) > abs(many.missing)
    if isinstance(baseline, int):
        assert many.baseline_value == pytest.approx(study.saliency(model, [5, 5, 5], 2, method="gradient").value, abs=1e-4)


def test_a_position_in_the_middle_is_the_text_until_there(model):
    whole, part = (study.saliency(model, ids, 2, position=at) for ids, at in (([3, 1, 4, 1], 1), ([3, 1], -1)))
    assert whole.tokens == [3, 1] and torch.equal(whole.shares, part.shares)


def test_passes_of_one_step_give_the_same(model, monkeypatch):
    seen = []
    together = study.saliency(model, [3, 1, 4], [2, 5], progress=lambda *done: seen.append(done))
    assert seen[-1] == (32, 32) and len(seen) == 1
    module = importlib.import_module("llama_ref.study.analyses.saliency")  # the package has a function of that name
    monkeypatch.setattr(module, "tokens_that_fit", lambda *given, **named: 1)
    torch.testing.assert_close(study.saliency(model, [3, 1, 4], [2, 5]).shares, together.shares, atol=1e-5, rtol=1e-4)


def test_a_quantized_model_has_shares_that_add_up_about_and_is_left_as_it_was():
    quantized = random_model(ModelArgs.from_dict(ARGS | {"dim": 32}), seed=0)
    quantize_model(quantized, "int8")
    before = quantized(torch.tensor([[3, 1, 4]]))
    found = study.saliency(quantized, [3, 1, 4], 2)
    assert abs(found.missing) < 0.1 * abs(found.value - found.baseline_value)
    assert torch.equal(quantized(torch.tensor([[3, 1, 4]])), before)


def test_a_vision_model_reads_text_and_refuses_an_image():
    vision = random_vision_model()
    assert study.saliency(vision, [3, 1, 4], 2).shares.isfinite().all()
    with pytest.raises(RequestError, match="image"):
        study.saliency(vision, [3, vision.image_id, 4], 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "smooth"}, "method is 'smooth', expected integrated, gradient×input, gradient"),
        ({"of": "loss"}, "of is 'loss', expected logit or log_probability"),
        ({"of": "log_probability", "other": 1}, "but other is given"),
        ({"steps": 0}, "steps is 0"),
        ({"baseline": "pad"}, "baseline is 'pad', expected mean, zero"),
        ({"baseline": torch.ones(3)}, r"direction is a tensor \(3,\)"),
        ({"positions": []}, r"positions is \[\]"),
        ({"positions": [9]}, "position is 9, expected a whole number from 0 to 1"),
        ({"position": 2}, "position is 2"),
        ({"target": 1000}, "token 1000 is not in the vocabulary"),
        ({"target": []}, r"target is \[\]"),
        ({"target": "Paris"}, "token 'Paris' is not in the vocabulary"),
        ({"target": [1, 2], "other": 3}, "the answer has several tokens"),
        ({"target": [1, 2], "position": 0}, "position is 0, but an answer's tokens come after"),
    ],
)
def test_what_makes_no_sense_is_refused(model, options, message):
    with pytest.raises(RequestError, match=message):
        study.saliency(model, [3, 1], **({"target": 2} | options))
