"""Gradients through quantized matrices equal those of the same model with dequantized weights."""

import copy

import pytest
import torch
from torch import nn

from llama_ref import study
from llama_ref.args import ModelArgs
from llama_ref.model import Transformer
from llama_ref.modules import replace_module
from llama_ref.quantization.apply import quantize_model, use_fast_kernels
from llama_ref.quantization.fp8 import Fp8Linear
from llama_ref.quantization.linear import QuantizedMatrix
from random_models import as_int4_release, random_model

ARGS = ModelArgs.from_dict(
    {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 96, "multiple_of": 256, "norm_eps": 1e-5}
    | {"rope_theta": 500000.0}
)
TEXT = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
NAMES = ["layers.*.residual_post", "layers.*.attention.head_output", "logits"]


def as_fp8(model: Transformer, *, rounds_inputs: bool) -> None:
    for name in [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".w" in name]:
        weight = model.get_parameter(f"{name}.weight")
        scale = weight.abs().amax(1) / 448
        q = (weight / scale[:, None]).to(torch.float8_e4m3fn)
        replace_module(model, name, Fp8Linear(q, scale, rounds_inputs=rounds_inputs))


QUANTIZED = {
    "int8": lambda model: quantize_model(model, "int8"),
    "int4": lambda model: quantize_model(model, "int4:group=32"),
    "int4, fast kernels": lambda model: (quantize_model(model, "int4:group=32"), use_fast_kernels(model)),
    "SpinQuant": lambda model: as_int4_release(model, rotates=True, rounds_inputs=False),
    "QLoRA": lambda model: as_int4_release(model, rank=4, rounds_inputs=False),
    "fp8": lambda model: as_fp8(model, rounds_inputs=False),
}
ROUNDING = {
    "SpinQuant, rounded inputs": lambda model: as_int4_release(model, rotates=True),
    "fp8, rounded inputs": lambda model: as_fp8(model, rounds_inputs=True),
}


def dequantized(model: Transformer) -> Transformer:
    """A copy with plain matrices of the same weights."""
    model = copy.deepcopy(model)
    matrices = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantizedMatrix)]
    for name, matrix in matrices:
        weight = matrix.dequantize()
        plain = nn.Embedding(*weight.shape) if name == "tok_embeddings" else nn.Linear(*weight.shape[::-1], bias=False)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        replace_module(model, name, plain)
    return model


def gradients(model: Transformer) -> list[torch.Tensor]:
    traced = study.trace(model, TEXT, NAMES, requires_grad=True)
    out = traced["logits"][:, -1, 7].sum()
    return list(torch.autograd.grad(out, [value for name, value in traced.items() if name != "logits"]))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_matrices_have_the_gradients_of_their_weights(kind):
    model = random_model(ARGS, seed=0)
    QUANTIZED[kind](model)
    for found, expected in zip(gradients(model), gradients(dequantized(model)), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ROUNDING)
def test_rounded_inputs_are_passed_straight_through(kind):
    model = random_model(ARGS, seed=0)
    ROUNDING[kind](model)
    for found, expected in zip(gradients(model), gradients(dequantized(model)), strict=True):
        assert nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.97


@pytest.mark.parametrize("kind", QUANTIZED | ROUNDING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_change_no_bit_and_leave_no_hook(kind, dtype):
    model = random_model(ARGS, seed=0).to(dtype)
    (QUANTIZED | ROUNDING)[kind](model)
    expected = model(torch.tensor(TEXT))
    with torch.inference_mode():
        traced = study.trace(model, TEXT, NAMES, requires_grad=True)
    assert torch.equal(traced["logits"], expected) and traced["logits"].requires_grad
    assert torch.equal(model(torch.tensor(TEXT)), expected)
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_are_the_same_in_inference_mode():
    model, metric, texts = random_model(ARGS, seed=0), study.logit_difference(3, 4), (TEXT[0], TEXT[1])

    def found():
        lens = study.TunedLens.fit(model, TEXT * 2, steps=2, tokens_per_step=8)
        return [
            study.saliency(model, TEXT[0], 3, steps=2).shares,
            study.attribute_edges(model, *texts, metric).scores,
            *(
                torch.tensor(study.attribution_patch(model, *texts, metric, along=way).values)
                for way in ("inputs", "activation")
            ),
            *lens.weights,
        ]

    with torch.inference_mode():
        inside = found()
    torch.testing.assert_close(inside, found())
