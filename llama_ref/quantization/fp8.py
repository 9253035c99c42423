"""Linear layers in float8 (e4m3) as in Meta's 405B, with one scale per row of each shard."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ref.device import HOPPER
from llama_ref.quantization.linear import QuantizedMatrix
from llama_ref.quantization.rounded_inputs import round_to_fp8


class Fp8Linear(QuantizedMatrix):
    """`q` float8_e4m3fn (N, K) and `scale` float32 (N,): w = q · scale.

    With `rounds_inputs`, inputs are rounded to float8 too. `columns`: the part of all `n_inputs`
    columns that this matrix holds; `forward` then takes all inputs, because the largest one sets
    the step.
    """

    q: Tensor
    scale: Tensor

    def __init__(
        self,
        q: Tensor,
        scale: Tensor,
        *,
        rounds_inputs: bool,
        columns: range | None = None,
        n_inputs: int | None = None,
    ):
        super().__init__()
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
        self.rounds_inputs, self.columns = rounds_inputs, columns
        self.shape = (q.shape[0], n_inputs or q.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        if not self.rounds_inputs:
            return self._times_blocks(x)
        n, step = round_to_fp8(x)
        n = self._own(n)
        if _has_product(n, x.dtype):
            flat = n.reshape(-1, n.shape[-1])
            steps, scales = step.reshape(-1, 1), self.scale[None]
            out = torch._scaled_mm(flat, self.q.T, scale_a=steps, scale_b=scales, out_dtype=x.dtype)
            return out.unflatten(0, x.shape[:-1])
        n = n.float()  # sums of unscaled products round once, with their scales
        parts = [(F.linear(n, self.q[rows].float()) * (step * self.scale[rows])).to(x.dtype) for rows in self._blocks()]
        return torch.cat(parts, dim=-1)

    def dequantized(self, rows: slice, dtype: torch.dtype) -> Tensor:
        return self._padded((self.q[rows].float() * self.scale[rows, None]).to(dtype))


class ColumnBlocks(QuantizedMatrix):
    """A matrix in column blocks, one per shard.

    Each rounds its own inputs, and the products are summed.
    """

    def __init__(self, blocks: Sequence[Fp8Linear], inputs: Sequence[range], n_inputs: int):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.inputs = inputs  # the columns of each block
        self.shape = (blocks[0].shape[0], n_inputs)

    @property
    def takes_whole_input(self) -> bool:
        return any(block.takes_whole_input for block in self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        parts = [block(x[..., own.start : own.stop]) for block, own in zip(self.blocks, self.inputs, strict=True)]
        return torch.stack(parts).float().sum(0).to(x.dtype)

    def dequantized(self, rows: slice, dtype: torch.dtype) -> Tensor:
        n_rows, device = len(range(*rows.indices(self.shape[0]))), next(self.buffers()).device
        out = torch.zeros(n_rows, self.shape[1], dtype=dtype, device=device)
        for block, own in zip(self.blocks, self.inputs, strict=True):
            assert isinstance(block, Fp8Linear)
            out[:, own.start : own.stop] = block.dequantized(rows, dtype)
        return out


def _has_product(n: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch._scaled_mm takes float8 with a scale per row: on NVIDIA GPUs since Hopper."""
    if not n.is_cuda or torch.version.hip is not None or dtype != torch.bfloat16 or n.shape[-1] % 16:
        return False
    return torch.cuda.get_device_capability(n.device) >= HOPPER
