"""Quantized linear layers and embedding in the layout of saved folders, for any device and dtype.

All have `dequantize()`, which returns the float32 matrix they compute with, and `quantized_bytes`.
For many rows, as in a prefill, blocks of the matrix are converted to the input's dtype and
multiplied as usual.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ref.compiled.triton.probe import uses_triton
from llama_ref.quantization.rounding import int4_scales, int8_scales, to_int4, to_int8, unpack

BLOCK_WEIGHTS = 1 << 22  # converted at a time: few enough to stay in the CPU's cache
CUDA_BLOCK_WEIGHTS = 1 << 26  # larger, because every block costs kernel launches
# Up to this many rows PyTorch's int8 kernel was faster than converting, on two Zen 5 cores. Its float32 form
# is not vectorized: slower even for one row (3.4 instead of 1.4 ms for a matrix of 2,048²), 14 times for 8.
FEW_ROWS = {torch.bfloat16: 48}


def on_cuda(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Multiply x (…, in) by a quantized matrix with our Triton kernels: (…, out)."""
    from llama_ref.compiled.triton.products import product  # imported late: it needs Triton

    return product(x.reshape(-1, x.shape[-1]), weight, scale, zero).unflatten(0, x.shape[:-1])


def has_few_rows(x: Tensor, most: Mapping[torch.dtype, int]) -> bool:
    """Whether x (…, K) has at most as many rows as `most` says for its dtype."""
    return x.numel() <= most.get(x.dtype, 0) * x.shape[-1]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights are dequantized: scales may be too small for float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def fits_int8_kernel(x: Tensor, q: Tensor) -> bool:
    """Whether torch._weight_int8pack_mm takes inputs x (…, K) and a matrix q int8 (…, K), both contiguous.

    In bfloat16 it reads aligned vectors of 16 numbers, and segfaults on other addresses.
    """
    return q.shape[-1] % 16 == 0 and q.data_ptr() % 16 == 0 and x.data_ptr() % 32 == 0


class QuantizedMatrix(nn.Module):
    """Base of the quantized modules; `shape` is (out, in).

    `columns`: for a matrix split along its inputs whose `forward` takes all inputs, the columns
    held here.
    """

    shape: tuple[int, int]
    columns: range | None = None

    @property
    def takes_whole_input(self) -> bool:
        """Whether `forward` of a split matrix takes all inputs, not only the held part's."""
        return self.columns is not None

    def dequantize(self) -> Tensor:
        """float32 (out, in)."""
        return torch.cat([self.dequantized(rows, torch.float32) for rows in self._blocks()])

    @property
    def quantized_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        return f"in_features={self.shape[1]}, out_features={self.shape[0]}"

    def dequantized(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Dequantized rows of the matrix: (n, in)."""
        raise NotImplementedError

    def _blocks(self) -> Iterator[slice]:
        weights = CUDA_BLOCK_WEIGHTS if next(self.buffers()).is_cuda else BLOCK_WEIGHTS
        step = max(1, weights // self.shape[1])
        return (slice(start, min(start + step, self.shape[0])) for start in range(0, self.shape[0], step))

    def _own(self, inputs: Tensor) -> Tensor:
        """The held part's slice of all inputs (…, in)."""
        if self.columns is None:
            return inputs
        return inputs[..., self.columns.start : self.columns.stop].contiguous()  # some kernels require it

    def _padded(self, rows: Tensor) -> Tensor:
        """Rows of the held part, with zeros for the other columns: (n, in)."""
        return rows if self.columns is None else F.pad(rows, (self.columns.start, self.shape[1] - self.columns.stop))

    def _times_blocks(self, x: Tensor) -> Tensor:
        """x (…, in) times the matrix, dequantized block by block."""
        parts = [F.linear(x, self.dequantized(rows, x.dtype)) for rows in self._blocks()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class Int8Matrix(QuantizedMatrix):
    """`q` int8 (N, K) and `scale` float32 (N,): w = q · scale.

    Scales from `int8_scales` are exact in bfloat16.
    """

    q: Tensor
    scale: Tensor

    def __init__(self, q: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
        self.shape = (q.shape[0], q.shape[1])

    @classmethod
    def from_weight(cls, weight: Tensor) -> "Int8Matrix":
        scale = int8_scales(weight)
        return cls(to_int8(weight, scale), scale)

    def dequantized(self, rows: slice, dtype: torch.dtype) -> Tensor:
        return (self.q[rows].float() * self.scale[rows, None]).to(dtype)


class Int8Linear(Int8Matrix):
    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        if uses_triton(x):
            return on_cuda(x, self.q, self.scale)
        if x.dtype == torch.float16:  # sums of unscaled products would overflow
            return self._times_blocks(x)
        if has_few_rows(x, FEW_ROWS) and not x.is_cuda:  # PyTorch's CUDA kernel is a naive loop
            flat = x.reshape(-1, x.shape[-1])
            if fits_int8_kernel(flat, self.q):
                return torch._weight_int8pack_mm(flat, self.q, self.scale.to(x.dtype)).unflatten(0, x.shape[:-1])
        parts = [F.linear(x, self.q[rows].to(x.dtype)) * self.scale[rows].to(x.dtype) for rows in self._blocks()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class Int8Embedding(Int8Matrix):
    """An int8 embedding whose outputs have the given `dtype`."""

    def __init__(self, q: Tensor, scale: Tensor, dtype: torch.dtype):
        super().__init__(q, scale)
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids (…) -> (…, dim)."""
        scale = F.embedding(tokens, self.scale[:, None])  # (…, 1)
        return (F.embedding(tokens, self.q).float() * scale).to(self.dtype)


class Int4Linear(QuantizedMatrix):
    """`packed` uint8 (N, K/2), `scale` and `zero` (N, K/G): w = (q - 8) · scale + zero.

    `scale` and `zero` are bfloat16 in our folders, float32 in Meta's, where `zero` is usually None.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, packed: Tensor, scale: Tensor, zero: Tensor | None = None):
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.shape = (packed.shape[0], 2 * packed.shape[1])

    @classmethod
    def from_weight(cls, weight: Tensor, group: int) -> "Int4Linear":
        scale, zero = int4_scales(weight, group)
        return cls(to_int4(weight, scale, zero), scale, zero)

    @property
    def group(self) -> int:
        return self.shape[1] // self.scale.shape[1]

    def unpacked(self, rows: slice = slice(None)) -> Tensor:
        """The numbers 0..15, one per byte: uint8 (N, K)."""
        return unpack(self.packed[rows], self.scale.shape[1]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        if uses_triton(x):
            return on_cuda(x, self.packed, self.scale, self.zero)
        return self._times_blocks(x)

    def dequantized(self, rows: slice, dtype: torch.dtype) -> Tensor:
        # With bfloat16 scales this rounds twice in bfloat16, each time by far less than a 4-bit step.
        wide = torch.promote_types(wide_dtype(dtype), self.scale.dtype)
        q = unpack(self.packed[rows], self.scale.shape[1]).to(wide).sub_(8)  # (n, K/G, G)
        q.mul_(self.scale[rows, :, None].to(wide))
        if self.zero is not None:
            q.add_(self.zero[rows, :, None].to(wide))
        return q.to(dtype).flatten(1)


class RowBlocks(QuantizedMatrix):
    """Several matrices with the same inputs as one matrix: their outputs are concatenated."""

    def __init__(self, blocks: Sequence[QuantizedMatrix]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.shape = (sum(block.shape[0] for block in blocks), blocks[0].shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        return torch.cat([block(x) for block in self.blocks], dim=-1)

    def dequantized(self, rows: slice, dtype: torch.dtype) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        parts = []
        for block in self.blocks:
            assert isinstance(block, QuantizedMatrix)
            if start < block.shape[0] and stop > 0:
                parts.append(block.dequantized(slice(max(start, 0), stop), dtype))
            start, stop = start - block.shape[0], stop - block.shape[0]
        return torch.cat(parts)
