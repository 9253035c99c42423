"""Prefill, decode and sampling on a fake CUDA device: no tensor stays on the CPU."""

from collections.abc import Iterator

import pytest
import torch

from fake_cuda import fake_cuda
from llama_ref.args import ModelArgs
from llama_ref.checkpoint.releases import find_release
from llama_ref.compiled.caches import new_cache
from llama_ref.model import Transformer
from llama_ref.sampling import Sampler, SamplingParams

pytestmark = pytest.mark.usefixtures("on_fake_cuda")


@pytest.fixture
def on_fake_cuda() -> Iterator[None]:
    with fake_cuda():
        yield


def cuda_model(name: str, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    args = ModelArgs.from_dict(find_release(name).params | {"n_layers": 2})
    with torch.device("meta"):
        model = Transformer(args)
    weights = {name: torch.empty(p.shape, dtype=dtype, device="cuda") for name, p in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["Llama3.2-1B", "Llama3.1-8B", "Llama-3-70B"])
def test_prefill_and_decode_stay_on_the_device(name, dtype):
    model = cuda_model(name, dtype)
    cache = new_cache(model, batch_size=2, n_tokens=64)
    tokens = torch.zeros(2, 12, dtype=torch.long, device="cuda")
    assert model(tokens).device.type == "cuda"
    for piece in (tokens, tokens, tokens[:, :1]):  # an empty cache, a later piece, one token
        logits = model(piece, cache)
        assert logits.device.type == "cuda"
        assert logits.dtype == torch.float32
        assert logits.shape == (2, piece.shape[1], model.args.vocab_size)
    cache.truncate([12, 7])
    model(tokens[:, :1], cache)
    assert cache.longest == 13


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.7, top_p=1),
        SamplingParams(temperature=0.6, top_p=0.9),
        SamplingParams(top_k=50, min_p=0.05, repetition_penalty=1.1, logit_bias={5: -1.0}),
    ],
    ids=["greedy", "plain", "top_p", "everything"],
)
def test_sampling_stays_on_the_device(params):
    sampler = Sampler(params, torch.Generator(), prompts=[[1, 2], [3]], vocab_size=128256, device="cuda")
    for _ in range(2):
        chosen = sampler(torch.empty(2, 128256, device="cuda"))
        assert chosen.device.type == "cuda"
        assert chosen.shape == (2,)


@pytest.mark.parametrize("step", ["embedding", "mask", "cache"])
def test_the_pretence_would_notice_a_tensor_left_behind(step):
    model = cuda_model("Llama3.2-1B")
    cache = new_cache(model, batch_size=1, n_tokens=8)
    tokens = torch.zeros(1, 4, dtype=torch.long, device="cuda")
    model(tokens, cache)
    if step == "embedding":
        tokens = tokens.cpu()
    elif step == "mask":
        cache.lengths = cache.lengths.cpu()
    else:
        cache.keys = cache.keys.cpu()
    with pytest.raises(RuntimeError, match="device"):
        model(tokens, cache)
