"""Properties of the model and its cache; tests/parity compares their numbers with others'."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llama_ref.args import ModelArgs
from llama_ref.compiled.cpu_cache import BlockKVCache
from llama_ref.kv_cache import KVCache, grouped_attention
from llama_ref.model import RMSNorm, Transformer, rotate
from random_models import random_model

ARGS = ModelArgs.from_dict(
    {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 50, "multiple_of": 16, "norm_eps": 1e-5}
    | {"rope_theta": 500000.0, "use_scaled_rope": True}
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(ARGS, seed=0)


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(ARGS.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


def test_parameters_carry_metas_names_and_shapes(model):
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    layer = {
        "attention.wq": (64, 64),
        "attention.wk": (16, 64),
        "attention.wv": (16, 64),
        "attention.wo": (64, 64),
        "feed_forward.w1": (176, 64),
        "feed_forward.w2": (64, 176),
        "feed_forward.w3": (176, 64),
        "attention_norm": (64,),
        "ffn_norm": (64,),
    }
    expected = {f"layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    expected |= {"tok_embeddings.weight": (50, 64), "norm.weight": (64,), "output.weight": (50, 64)}
    assert shapes == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_float32_whatever_the_weights_are(dtype):
    model = random_model(ARGS, seed=0).to(dtype)
    assert model(tokens(2, 5)).dtype == torch.float32
    assert model(tokens(2, 5)).shape == (2, 5, ARGS.vocab_size)


def test_casting_the_model_leaves_rope_exact():
    """Frequencies rounded to bfloat16 would rotate late positions wrongly by whole radians.

    They are not a buffer, so that a cast does not change them.
    """
    cast = random_model(ARGS, seed=0).bfloat16().float()  # only the weights may be rounded
    fresh = Transformer(ARGS)
    fresh.load_state_dict(cast.state_dict())
    caches = [KVCache(ARGS, 1, 8192, dtype=torch.float32) for _ in range(2)]
    for cache in caches:
        cache.keys.zero_()
        cache.values.zero_()
        cache.truncate([8000])
    assert torch.equal(cast(tokens(1, 3), caches[0]), fresh(tokens(1, 3), caches[1]))


def test_a_later_token_changes_no_earlier_logits(model):
    text = tokens(1, 9)
    changed = text.clone()
    changed[0, -1] = (changed[0, -1] + 1) % ARGS.vocab_size
    before, after = model(text), model(changed)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def test_what_lies_beyond_a_rows_length_is_never_looked_at(model):
    cache, poisoned = (KVCache(ARGS, 1, 16, dtype=torch.float32) for _ in range(2))
    for each in (cache, poisoned):
        model(tokens(1, 6), each)
        each.truncate([3])
    poisoned.keys[:, :, :, 3:] = poisoned.values[:, :, :, 3:] = 1e4
    assert torch.equal(model(tokens(1, 4), cache), model(tokens(1, 4), poisoned))


def test_a_full_cache_refuses_another_token_and_says_both_numbers(model):
    cache = KVCache(ARGS, 1, 4, dtype=torch.float32)
    model(tokens(1, 4), cache)
    with pytest.raises(ValueError, match=r"4 \+ 1 tokens do not fit into a cache of 4"):
        model(tokens(1, 1), cache)


def test_hidden_then_logits_is_forward(model):
    assert torch.equal(model(tokens(2, 5)), model.logits(model.hidden(tokens(2, 5))))


class LargestResult(TorchDispatchMode):
    """Records the largest number of elements in any operator's new result; views do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in inputs:
            self.elements = max(self.elements, out.numel())
        return out


def test_keys_and_values_are_not_copied_for_the_query_heads_that_share_them():
    S, H, K, hd = 512, 8, 2, 16
    q, k, v = torch.randn(1, 1, H, hd), torch.randn(1, S, K, hd), torch.randn(1, S, K, hd)
    with LargestResult() as seen:
        out = grouped_attention(q, k, v, torch.ones(1, 1, H // K, S, dtype=torch.bool))
    assert seen.elements < k.numel()
    repeated = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(H // K, dim=1) for x in (k, v))
    )
    torch.testing.assert_close(out, repeated.transpose(1, 2))


def test_a_rotation_keeps_lengths_and_turns_neighbours_together():
    x = torch.randn(1, 1, 1, 4)
    quarter = torch.full((1, 1, 1, 2), torch.pi / 2)
    turned = rotate(x, quarter.cos(), quarter.sin())
    expected = torch.stack((-x[..., 1], x[..., 0], -x[..., 3], x[..., 2]), dim=-1)
    torch.testing.assert_close(turned, expected)


def test_rms_norm_works_in_float32_inside():
    """The squares of 300 overflow float16; their mean's root does not."""
    x = torch.full((1, 8), 300.0, dtype=torch.float16)
    torch.testing.assert_close(RMSNorm(8, 1e-5).half()(x), torch.ones(1, 8, dtype=torch.float16))


def test_gradients_reach_every_parameter():
    model = random_model(ARGS, seed=0).requires_grad_(True)
    model(tokens(1, 6)).logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu(model):
    text = tokens(2, 9)
    on_cuda = random_model(ARGS, seed=0).cuda()
    torch.testing.assert_close(on_cuda(text.cuda()).cpu(), model(text), atol=1e-3, rtol=0)
    cache = KVCache(ARGS, 2, 9, dtype=torch.float32, device="cuda")
    pieces = [on_cuda(piece, cache).cpu() for piece in text.cuda().split([5, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(text), atol=1e-3, rtol=0)


# ---- dtypes and devices


@pytest.mark.parametrize("kind", [KVCache, BlockKVCache])
def test_under_autocast_a_cache_gives_what_one_forward_gives(model, kind):
    """Under autocast, keys are bfloat16 and the cache is float32."""
    text = tokens(2, 9)
    cache = kind(ARGS, 2, 64, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(text)
        found = torch.cat([model(part, cache) for part in text.split((6, 1, 2), dim=1)], dim=1)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cache_may_have_fewer_bits_than_the_model(model, dtype):
    text = tokens(2, 9)
    cache = KVCache(ARGS, 2, 16, dtype=dtype)
    with torch.no_grad():
        found = torch.cat([model(part, cache) for part in text.split((6, 1, 2), dim=1)], dim=1)
        torch.testing.assert_close(found, model(text), rtol=0, atol=0.05)
