"""Int8 matrices in the layout of the compiled decode step: long rows are cut into column blocks.

A product runs through all rows of one column block at a time, with a piece of the vector that stays in
the L1 cache. Whole rows of 8,192 need 32 KB of it in float32, which the streamed weights evict: they
were read at three quarters of the speed.
"""

import torch
from torch import Tensor

from llama_ref.machine import memory
from llama_ref.quantization.linear import FEW_ROWS, Int8Linear, Int8Matrix, fits_int8_kernel, has_few_rows, wide_dtype

LONG_ROW, PIECE = 4096, 1024  # longer rows are cut into pieces


def in_pieces(columns: int) -> bool:
    """Whether rows with this many columns are cut into pieces."""
    return columns > LONG_ROW and columns % PIECE == 0


class PiecewiseInt8Linear(Int8Matrix):
    """An Int8Linear with `q` int8 (P, N, 1024), P pieces of each row, and `scale` float32 (N,)."""

    def __init__(self, module: Int8Linear):
        super().__init__(memory.contiguous(module.q.unflatten(1, (-1, PIECE)).transpose(0, 1)), module.scale)
        self.shape = module.shape

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out), for prompts and batches."""
        if not has_few_rows(x, FEW_ROWS):
            return self._times_blocks(x)
        pieces = x.reshape(-1, len(self.q), PIECE).transpose(0, 1).contiguous()  # (P, T, 1024)
        if not fits_int8_kernel(pieces, self.q):
            return self._times_blocks(x)
        scale = self.scale.to(x.dtype)
        products = [torch._weight_int8pack_mm(*each, scale).float() for each in zip(pieces, self.q, strict=True)]
        return torch.stack(products).sum(0).to(x.dtype).unflatten(0, x.shape[:-1])

    def dequantized(self, rows: slice, dtype: torch.dtype) -> Tensor:
        shape = len(self.scale[rows]), len(self.q), PIECE
        wide = torch.empty(shape, dtype=wide_dtype(dtype), device=self.q.device)  # (n, P, 1024)
        wide.copy_(self.q[:, rows].transpose(0, 1))
        return wide.flatten(1).mul_(self.scale[rows, None].to(wide.dtype)).to(dtype)
