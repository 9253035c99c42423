"""The linear layer of Meta's int4 releases, SpinQuant and QLoRA.

4-bit weights with a float32 scale per group of inputs. Besides the product, in this order:
SpinQuant rotates the inputs of w2; "reference" activations round the inputs to 8 bits, as in Meta's
code and in the releases' training; QLoRA adds a low-rank product of the inputs before rounding.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ref.quantization.hadamard import Factors, hadamard, hadamard_factors
from llama_ref.quantization.linear import Int4Linear, QuantizedMatrix
from llama_ref.quantization.rounded_inputs import round_to_int8


class LowRank(nn.Module):
    """LoRA (arXiv:2106.09685): scale · B A x, with `a` (rank, K) and `b` (N, rank)."""

    a: Tensor
    b: Tensor

    def __init__(self, a: Tensor, b: Tensor, scale: float):
        super().__init__()
        self.register_buffer("a", a)
        self.register_buffer("b", b)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) -> (…, N), in the dtype of x."""
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.scale


Product = Callable[[Tensor], Tensor]


def surrounded(x: Tensor, product: Product, adapted: Product | None, factors: Factors | None, rounds_inputs: bool) -> Tensor:
    """Multiply x (…, in), with optional rotation, rounded inputs and low-rank product: (…, out).

    `product` and `adapted` (the low-rank product) take and return the dtype of x. `factors`: those
    of the rotation, or None.
    """
    inputs = x if factors is None else hadamard(x, factors)
    added = None if adapted is None else adapted(inputs.to(x.dtype))
    if rounds_inputs:
        n, step = round_to_int8(inputs)
        if x.dtype == torch.float32:
            out = product(n * step)  # same order of operations as Meta's code
        else:
            out = (product(n.to(x.dtype)) * step).to(x.dtype)  # n is exact in any dtype, n · step is not
    else:
        out = product(inputs.to(x.dtype))
    return out if added is None else out + added


class MetaInt4Linear(QuantizedMatrix):
    """An int4 `matrix` with optional rotation, rounding of inputs and low-rank adaptor.

    `columns`: the part of all inputs that the matrix holds; `forward` then takes all inputs,
    because the rotation and the rounding need them. None: the matrix holds all inputs, or its part
    is enough.
    """

    def __init__(
        self,
        matrix: Int4Linear,
        *,
        rounds_inputs: bool,
        rotates_inputs: bool = False,
        adaptor: LowRank | None = None,
        columns: range | None = None,
        n_inputs: int | None = None,
    ):
        super().__init__()
        self.matrix = matrix
        self.rounds_inputs, self.rotates_inputs = rounds_inputs, rotates_inputs
        self.adaptor = adaptor
        self.columns = columns
        self.shape = (matrix.shape[0], n_inputs or matrix.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        factors = hadamard_factors(x.shape[-1], x.device) if self.rotates_inputs else None
        return surrounded(x, self._product, self._adapted if self.adaptor else None, factors, self.rounds_inputs)

    def _product(self, inputs: Tensor) -> Tensor:
        return self.matrix(self._own(inputs))

    def _adapted(self, inputs: Tensor) -> Tensor:
        assert self.adaptor is not None
        return self.adaptor(self._own(inputs))

    def dequantized(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Rows of the effective matrix: what the layer multiplies by if inputs are not rounded."""
        w = self.matrix.dequantized(rows, torch.float32)
        if self.adaptor is not None:
            w = w + self.adaptor.scale * (self.adaptor.b[rows].float() @ self.adaptor.a.float())
        w = self._padded(w)
        return (hadamard(w) if self.rotates_inputs else w).to(dtype)
