"""The forwards that repeat model.py's lines for speed or study compute what it computes, on random shapes."""

from collections.abc import Callable

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
from llama_ref.model import Transformer
from parity.shapes import shapes
from random_models import random_model

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
    """Uncompiled: Inductor's part is in tests/compiled."""
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
    """With PyTorch's operators: our kernels' part is in tests/compiled."""
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
    """To the bit."""
    model = random_model(args, seed)
    expected = prompt_and_steps(model, args, seed, batch)
    with study.recording(model, "*"):
        assert torch.equal(prompt_and_steps(model, args, seed, batch), expected)
