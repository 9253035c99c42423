"""Logits agree with Meta's reference and with Hugging Face's, on random shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_models.llama3.model import precompute_freqs_cis

from llama_ref.args import ModelArgs
from llama_ref.kv_cache import KVCache
from llama_ref.model import rope_frequencies, rope_rotations
from parity.oracles import hugging_faces_model, metas_model
from parity.shapes import shapes
from random_models import random_model

pytestmark = pytest.mark.usefixtures("one_process_group")
CLOSE = {"atol": 1e-4, "rtol": 0}
# The implementations sum over keys and features in different orders, so float32 differs in the last
# bits.


def random_tokens(args: ModelArgs, batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(args.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
@settings(max_examples=30, deadline=None, derandomize=True)
@given(shapes(factors=(None, 8.0)), st.booleans(), st.integers(0, 1000))
def test_all_at_once_and_step_by_step_equal_metas_reference(args, tied, seed):
    model = random_model(args, seed, tied=tied)
    tokens = random_tokens(args, batch=2, length=17, seed=seed)
    expected = metas_model(model, max_seq_len=32, max_batch_size=2)(tokens, 0)
    torch.testing.assert_close(model(tokens), expected, **CLOSE)

    cache = KVCache(args, 2, 17, dtype=torch.float32)
    pieces = [model(piece, cache) for piece in tokens.split([5, 1, 1, 7, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, **CLOSE)


@torch.inference_mode()
@settings(max_examples=30, deadline=None, derandomize=True)
@given(shapes(head_dims=(None, 6, 32)), st.booleans(), st.integers(0, 1000))
def test_logits_equal_hugging_faces(args, tied, seed):
    model = random_model(args, seed, tied=tied)
    tokens = random_tokens(args, batch=2, length=23, seed=seed)
    torch.testing.assert_close(model(tokens), hugging_faces_model(model)(tokens).logits, **CLOSE)


@torch.inference_mode()
@settings(max_examples=10, deadline=None, derandomize=True)
@given(shapes(factors=(None, 8.0)), st.integers(0, 1000))
def test_rows_of_different_lengths_each_equal_metas_reference_alone(args, seed):
    """Each row's cache is truncated to its own length and continues there."""
    model = random_model(args, seed)
    tokens = random_tokens(args, batch=3, length=20, seed=seed)
    lengths = [14, 3, 9]
    cache = KVCache(args, 3, 20, dtype=torch.float32)
    model(tokens[:, :14], cache)
    cache.truncate(lengths)
    further = torch.stack([row[n : n + 6] for row, n in zip(tokens, lengths, strict=True)])
    logits = torch.cat([model(piece, cache) for piece in further.split([1, 4, 1], dim=1)], dim=1)  # (3, 6, V)
    for row, n, ours in zip(tokens, lengths, logits, strict=True):
        expected = metas_model(model, max_seq_len=32)(row[None, : n + 6], 0)[0, n:]
        torch.testing.assert_close(ours, expected, **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 500000.0), (128, 500000.0), (64, 100000.0)])
def test_rotations_equal_metas_at_every_position_of_the_longest_context(head_dim, theta, scaled):
    args = ModelArgs.from_dict(
        {"dim": 4 * head_dim, "n_layers": 1, "n_heads": 4, "vocab_size": 8, "multiple_of": 8, "norm_eps": 1e-5}
        | {"rope_theta": theta, "use_scaled_rope": scaled}
    )
    cos, sin = rope_rotations(torch.arange(131072)[None], rope_frequencies(args))
    expected = precompute_freqs_cis(head_dim, 131072, theta, scaled)
    # float32 resolves an angle of 131,072 radians to 0.008: one more rounding of a frequency has
    # this effect.
    torch.testing.assert_close(torch.complex(cos, sin)[0, :, 0], expected, atol=0.02, rtol=0)
    torch.testing.assert_close(torch.complex(cos, sin)[0, :4096, 0], expected[:4096], atol=6e-4, rtol=0)


@torch.inference_mode()
@settings(max_examples=10, deadline=None, derandomize=True)
@given(shapes(factors=(None, 8.0)), st.integers(0, 1000))
def test_bfloat16_stays_as_near_to_float32_as_metas_reference_does(args, seed):
    model = random_model(args, seed)
    tokens = random_tokens(args, batch=2, length=17, seed=seed)
    exact = model(tokens)
    model = model.bfloat16()
    ours = (model(tokens) - exact).square().mean().sqrt()
    metas = (metas_model(model, max_seq_len=32, max_batch_size=2)(tokens, 0) - exact).square().mean().sqrt()
    assert ours < 1.2 * metas
