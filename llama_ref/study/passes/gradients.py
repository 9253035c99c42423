"""Gradients of a model's activations, through quantized matrices too.

The kernels of quantized matrices have no backward pass. Inside `gradients` their outputs stay
bit-identical, and the gradient of their input is that of a product with the dequantized matrix; the
rounding of inputs, where a kernel has it, is ignored.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llama_ref.model import Transformer
from llama_ref.quantization.linear import QuantizedMatrix


@contextmanager
def gradients(model: Transformer) -> Iterator[None]:
    """Record gradients in the block, even inside no_grad or inference mode."""
    matrices = [module for module in model.modules() if isinstance(module, QuantizedMatrix)]
    handles = [matrix.register_forward_hook(_with_gradient) for matrix in matrices]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _with_gradient(matrix: QuantizedMatrix, inputs: tuple[Tensor], out: Tensor) -> Tensor | None:
    """A hook after a matrix's forward: the same output, with a gradient if its input has one (ids do not)."""
    (x,) = inputs
    return _Through.apply(x, out.detach(), matrix) if x.requires_grad else None


class _Through(torch.autograd.Function):
    """Returns `out` (…, N), whose gradient flows to x (…, K) through the dequantized matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, matrix: QuantizedMatrix) -> Tensor:
        ctx.matrix = matrix
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return (grad.float() @ ctx.matrix.dequantize()).to(grad.dtype), None, None
