"""The generation loop by itself, on a model small enough to break."""

import pytest
import torch

from llama_ref.args import ModelArgs
from llama_ref.compiled.caches import new_cache
from llama_ref.decoding import reading
from llama_ref.decoding.loop import steps
from llama_ref.decoding.row import Row
from llama_ref.errors import LlamaRefError
from random_models import random_model

ARGS = ModelArgs.from_dict(
    {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 30, "multiple_of": 8, "norm_eps": 1e-5}
    | {"rope_theta": 10000.0}
)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


@pytest.mark.parametrize("made_before", [0, 1, 3])
def test_logits_that_are_no_numbers_end_it_at_whatever_step(made_before):
    model = random_model(ARGS, seed=0)
    row = Row([1, 2, 3], max_gen_len=8)
    making = steps(model, [row], greedy, stop_tokens=())
    for _ in range(made_before):
        next(making)
    model.norm.weight.fill_(float("nan"))
    with pytest.raises(LlamaRefError, match=r"not numbers \(NaN\) in float32: check the weights"):
        next(making)
    assert len(row.generated) == made_before


def test_float16_that_overflows_is_advised_to_take_another_dtype():
    model = random_model(ARGS, seed=0).half()
    model.layers[1].feed_forward.w2.weight.fill_(6e4)
    with pytest.raises(LlamaRefError, match="in float16: try dtype=bfloat16 or float32"):
        list(steps(model, [Row([1, 2, 3], max_gen_len=4)], greedy, stop_tokens=()))


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 3e38])
def test_a_new_caches_junk_is_never_seen(junk):
    """New memory holds old data, which must not show, even where a shorter row writes nothing."""
    model = random_model(ARGS, seed=0)
    prompts = [[1, 2, 3, 4, 5, 6], [7, 8], [9]]
    alone = [Row(prompt, max_gen_len=5) for prompt in prompts]
    for row in alone:
        list(steps(model, [row], greedy, stop_tokens=()))
    cache = new_cache(model, batch_size=3, n_tokens=11)
    cache.keys.fill_(junk)
    cache.values.fill_(junk)
    rows = [Row(prompt, max_gen_len=5) for prompt in prompts]
    list(steps(model, rows, greedy, stop_tokens=(), cache=cache))
    assert [row.generated for row in rows] == [row.generated for row in alone]


def test_many_rows_go_through_in_shorter_pieces(monkeypatch):
    """The total number of tokens of all rows bounds activations."""
    monkeypatch.setattr(reading, "PREFILL_TOKENS", 8)
    model = random_model(ARGS, seed=0)
    seen = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, cache: seen.append(tokens.numel()) or hidden(tokens, cache))
    list(steps(model, [Row([1] * 11, max_gen_len=1) for _ in range(3)], greedy, stop_tokens=()))
    assert max(seen) <= 8
    assert sum(seen) == 33
