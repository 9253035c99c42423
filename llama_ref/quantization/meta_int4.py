"""The linear layer of Meta's int4 releases: SpinQuant's and QLoRA's.

Four-bit weights with a float32 scale per group of inputs. Around the product, in this order: SpinQuant
rotates the inputs of w2; "reference" arithmetic rounds the inputs to 8 bits, as Meta's code does and
the releases were trained with; QLoRA adds a product of low rank, of the inputs that are not rounded.
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
    """A product of x (…, in) with all that surrounds it: (…, out).

    `product` and `adapted` (the product of low rank) take and return the dtype of x. `factors`: those
    of the rotation, None without it.
    """
    inputs = x if factors is None else hadamard(x, factors)
    added = None if adapted is None else adapted(inputs.to(x.dtype))
    if rounds_inputs:
        n, step = round_to_int8(inputs)
        if x.dtype == torch.float32:
            out = product(n * step)  # in the order of Meta's code
        else:
            out = (product(n.to(x.dtype)) * step).to(x.dtype)  # n is exact in any dtype, n · step is not
    else:
        out = product(inputs.to(x.dtype))
    return out if added is None else out + added


class MetaInt4Linear(QuantizedMatrix):
    """`matrix` with what surrounds it.

    `columns`: the matrix's part of all inputs, which `forward` then takes, because the rotation and
    the rounding need them all. None: the matrix has all inputs, or a part of them is enough.
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
        """Rows of the matrix that this layer multiplies by when no input is rounded."""
        w = self.matrix.dequantized(rows, torch.float32)
        if self.adaptor is not None:
            w = w + self.adaptor.scale * (self.adaptor.b[rows].float() @ self.adaptor.a.float())
        w = self._padded(w)
        return (hadamard(w) if self.rotates_inputs else w).to(dtype)
