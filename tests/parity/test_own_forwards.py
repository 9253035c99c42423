"""Forwards that reimplement model.py and vision.py for speed or study give the same results."""

from collections.abc import Callable
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_ref import study
from llama_ref.args import ModelArgs
from llama_ref.compiled import cpu
from llama_ref.compiled.caches import new_cache
from llama_ref.compiled.cuda import FastForward, FastHidden, FastPasses
from llama_ref.compiled.forward import install
from llama_ref.decoding.loop import steps
from llama_ref.decoding.row import Row
from llama_ref.images import tiles_of
from llama_ref.model import Transformer
from parity.shapes import shapes
from random_models import random_model
from study.pictured import picture, random_vision_model

CLOSE = {"atol": 1e-4, "rtol": 0}
HEAD_DIMS = (None, 6, 32)


def prompt_and_steps(model: Transformer, args: ModelArgs, seed: int, batch: int) -> Tensor:
    """Logits of a prompt in two pieces and of three steps."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(args.vocab_size, (batch, 12), generator=generator)
    cache = new_cache(model, batch, 12)
    return torch.cat([model(piece, cache) for piece in tokens.split((5, 4, 1, 1, 1), dim=1)], dim=1)


@torch.inference_mode()
@settings(max_examples=20, deadline=None, derandomize=True)
@given(shapes(head_dims=HEAD_DIMS), st.integers(0, 1000))
def test_the_step_that_is_compiled_for_a_cpu(args, seed):
    """Uncompiled: tests/compiled covers Inductor."""
    plain, fast = random_model(args, seed), random_model(args, seed)
    steps: list[int] = []

    def step(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        steps.append(1)
        return cpu._layer_step(*inputs)

    for block in fast.layers:
        install(block, forward=cpu._FastBlock(block, step))
    install(fast.output, forward=cpu._FastOutput(fast.output, cpu.matvec))
    found, expected = (prompt_and_steps(model, args, seed, 1) for model in (fast, plain))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert len(steps) == 3 * args.n_layers


def at_once(run: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Tensor]:
    """A capture without a graph."""
    return lambda: run(*inputs)


@torch.inference_mode()
@settings(max_examples=20, deadline=None, derandomize=True)
@given(shapes(head_dims=HEAD_DIMS), st.integers(0, 1000), st.integers(1, 3))
def test_the_passes_for_cuda(args, seed, batch):
    """With PyTorch's operators: tests/compiled covers our kernels."""
    plain, fast = random_model(args, seed), random_model(args, seed)
    passes = FastPasses(fast, at_once)
    install(fast, hidden=FastHidden(passes), forward=FastForward(passes))
    found, expected = (prompt_and_steps(model, args, seed, batch) for model in (fast, plain))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert passes.graphs


@torch.inference_mode()
@settings(max_examples=20, deadline=None, derandomize=True)
@given(shapes(head_dims=HEAD_DIMS), st.integers(0, 1000), st.integers(1, 3))
def test_the_forwards_that_show_every_activation(args, seed, batch):
    """Equal bit for bit."""
    model = random_model(args, seed)
    expected = prompt_and_steps(model, args, seed, batch)
    with study.recording(model, "*"):
        assert torch.equal(prompt_and_steps(model, args, seed, batch), expected)


@torch.inference_mode()
@settings(max_examples=10, deadline=None, derandomize=True)
@given(shapes(head_dims=HEAD_DIMS), st.integers(0, 1000), st.integers(1, 4), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_forwards_that_show_every_activation_of_an_image(args, seed, n_cross, dtype):
    """Equal bit for bit, the answer's log-probabilities too."""
    args = replace(args, vision_chunk_size=56, vision_num_cross_attention_layers=n_cross, vision_dim=32, vision_n_heads=2)
    args = replace(args, vision_n_layers=3, vision_n_global_layers=2, vision_kept_layers=(0, 2))
    model = random_vision_model(args, seed).to(dtype)
    tiles = [tiles_of(picture(*size, seed), 56, 4) for size in ((100, 50), (50, 50))]

    def answer() -> Tensor:
        image = args.vocab_size
        rows = [Row([5, image, 7, image, 9], 3, tiles), Row([1, 2], 3)]
        seen = []

        def sample(logits: Tensor) -> Tensor:
            seen.append(logits)
            return logits.argmax(-1)

        for _ in steps(model, rows, sample, []):
            pass
        return torch.stack(seen)

    expected = answer()
    with study.recording(model, "*") as record:
        assert torch.equal(answer(), expected)
    assert expected.isfinite().all() and "vision.tokens" in record.trace
