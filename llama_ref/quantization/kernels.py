"""Four-bit matrices in the layouts that PyTorch's own kernels demand, on a CPU and on CUDA.

`faster(module, dtype)` turns an Int4Linear into one of these where there is a kernel for it. Int8Linear needs no other layout.
The CUDA half has run under pretended devices only; its speed is not known.
"""

from functools import cache

import torch
from torch import Tensor

from llama_ref import huge_pages
from llama_ref.quantization.modules import Int4Linear, QuantizedMatrix, wide_dtype
from llama_ref.quantization.rounding import unpack

aten = torch.ops.aten

TILE_ROWS = 64  # tiles may have 16, 32 or 64 rows, by the processor's vectors; matrices are filled up to a multiple of all
CONVERTED_WEIGHTS = 1 << 21  # at a time: the kernel's packing wants each number as an int32
FEW_ROWS = 128  # up to here the kernel was faster than turning the matrix into bfloat16, on two Zen 5 cores
AMPERE = (8, 0)  # the first NVIDIA cards with bfloat16, without which the CUDA kernel does not run
CUDA_K_TILES = (8, 4, 2)


def faster(module: Int4Linear, dtype: torch.dtype) -> QuantizedMatrix:
    """The same matrix in the layout of PyTorch's kernel for its device and inputs of `dtype`; itself where there is none."""
    device = module.packed.device
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float32) and _tile() is not None:
        return TiledInt4Linear(module, dtype)
    if device.type == "cuda" and dtype == torch.bfloat16 and _k_tiles(*module.shape) and _is_ampere(device):
        return CudaInt4Linear(module)
    return module


class TiledInt4Linear(QuantizedMatrix):
    """An Int4Linear as the CPU's kernel wants it: tiles of some rows, in each the rows' numbers column by column.

    `tiles` uint8 (N/R, K, R/2) with R rows in a tile, `scale_and_zero` (K/G, N, 2) in the dtype of the inputs, both with N
    filled up with zeros.
    """

    def __init__(self, module: Int4Linear, dtype: torch.dtype):
        super().__init__()
        self.shape, self.group = module.shape, module.group
        rows, _ = _tile()
        N, K = self.shape
        padded = -(-N // TILE_ROWS) * TILE_ROWS
        tiles = huge_pages.empty(padded // rows, K, rows // 2, dtype=torch.uint8)
        step = max(1, CONVERTED_WEIGHTS // K // TILE_ROWS) * TILE_ROWS
        for start in range(0, padded, step):
            q = module.unpacked(slice(start, start + step)).int()
            q = torch.nn.functional.pad(q, (0, 0, 0, min(step, padded - start) - len(q)))
            block = aten._convert_weight_to_int4pack_for_cpu(q, 1)
            tiles[start // rows : (start + len(q)) // rows] = block.view(-1, K, rows // 2)
        scale_and_zero = torch.zeros(K // self.group, padded, 2, dtype=dtype)
        scale_and_zero[:, :N, 0], scale_and_zero[:, :N, 1] = module.scale.T, module.zero.T
        self.register_buffer("tiles", tiles)
        self.register_buffer("scale_and_zero", scale_and_zero)

    @property
    def scale(self) -> Tensor:
        """(N, K/G), as `Int4Linear.scale`."""
        return self.scale_and_zero[:, : self.shape[0], 0].T

    @property
    def zero(self) -> Tensor:
        return self.scale_and_zero[:, : self.shape[0], 1].T

    def unpacked(self, rows: slice = slice(None)) -> Tensor:
        """The numbers 0..15 one in a byte: uint8 (N, K)."""
        start, stop, _ = rows.indices(self.shape[0])
        size, _ = _tile()
        tiles = self._by_row(slice(start // size, -(-stop // size)))  # (n, K, R)
        return tiles.transpose(1, 2).flatten(0, 1)[start % size :][: stop - start]

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        few = x.numel() <= FEW_ROWS * x.shape[-1]
        if not few or x.dtype != self.scale_and_zero.dtype:
            parts = [x @ self._columns(rows, x.dtype) for rows in self._blocks()]
            return torch.cat(parts, dim=-1)
        packed = self.tiles.view(-1, self.shape[1] // 2)
        flat = x.reshape(-1, self.shape[1])
        out = aten._weight_int4pack_mm_for_cpu(flat, packed, self.group, self.scale_and_zero)
        return out[:, : self.shape[0]].unflatten(0, x.shape[:-1])

    def _by_row(self, tiles: slice) -> Tensor:
        """Some tiles' numbers with the rows in order: uint8 (n, K, R)."""
        _, order = _tile()
        q = torch.cat((self.tiles[tiles] & 15, self.tiles[tiles] >> 4), dim=-1)
        return q if order is None else q.index_select(-1, order)

    def _columns(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some rows' weights as columns, (K, n): tiles hold them so, and to turn them round takes longer than all else."""
        wide = wide_dtype(dtype)
        start, stop, _ = rows.indices(self.shape[0])
        size, _ = _tile()
        tiles = slice(start // size, -(-stop // size))
        q = self._by_row(tiles).to(wide).sub_(8).unflatten(1, (-1, self.group))  # (n, K/G, G, R)
        scale_and_zero = self.scale_and_zero[:, tiles.start * size : tiles.stop * size].to(wide)
        scale, zero = (part.contiguous() for part in scale_and_zero.unflatten(1, (-1, size)).movedim(0, 1).unbind(-1))
        weights = q.mul_(scale[:, :, None]).add_(zero[:, :, None]).flatten(1, 2)  # (n, K, R)
        return weights.transpose(0, 1).flatten(1)[:, start % size :][:, : stop - start].to(dtype)

    def _rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        return self._columns(rows, dtype).T


class CudaInt4Linear(QuantizedMatrix):
    """An Int4Linear as the CUDA kernel wants it, for inputs in bfloat16."""

    def __init__(self, module: Int4Linear):
        super().__init__()
        self.shape, self.group = module.shape, module.group
        q = unpack(module.packed, module.scale.shape[1]).flatten(1)
        pairs = q[:, ::2] << 4 | q[:, 1::2]  # here the first of two is in the high bits
        tiles = aten._convert_weight_to_int4pack(pairs.contiguous(), _k_tiles(*self.shape))
        self.register_buffer("tiles", tiles)
        self.register_buffer("scale_and_zero", torch.stack((module.scale.T, module.zero.T), dim=-1).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        flat = x.reshape(-1, self.shape[1])
        return aten._weight_int4pack_mm(flat, self.tiles, self.group, self.scale_and_zero).unflatten(0, x.shape[:-1])

    def dequantize(self) -> Tensor:
        """float32 (out, in), the products with the unit matrix, which the kernel rounds to bfloat16."""
        unit = torch.eye(self.shape[1], dtype=torch.bfloat16, device=self.tiles.device)
        return self(unit).T.float()


def _is_ampere(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= AMPERE


def _k_tiles(rows: int, columns: int) -> int | None:
    """The widest of the kernel's tiles that the columns are a multiple of; None where it cannot take the matrix."""
    return next((tiles for tiles in CUDA_K_TILES if columns % (16 * tiles) == 0 and rows % 8 == 0), None)


@cache
def _tile() -> tuple[int, Tensor | None] | None:
    """How this processor's kernel lays out a tile: its rows, and where in its low, then its high halves each row is found.

    Packing is documented nowhere and differs from processor to processor, so that a matrix that says of each number where it
    stood is packed to find out. None for the order where it is 0, 1, …; None in all for a layout that is not made of tiles.
    """
    columns = 32
    row = torch.arange(TILE_ROWS)[:, None].expand(-1, columns)
    column = torch.arange(columns).expand(TILE_ROWS, -1)
    try:
        seen = [_halves(part) for part in (row % 16, row // 16, column % 16, column // 16)]
    except RuntimeError:
        return None  # no such kernel here
    rows, found_columns = seen[0] + 16 * seen[1], seen[2] + 16 * seen[3]  # (bytes, 2)
    for size in (16, 32, 64):
        places = rows.view(-1, columns, size // 2, 2)  # (tiles, K, R/2, low and high)
        first = places[0, 0].T.flatten()  # (R,)
        tile_starts = torch.arange(len(places))[:, None, None] * size
        is_tiled = (places.transpose(2, 3).flatten(2) == first + tile_starts).all()
        in_order = (found_columns.view(-1, columns, size // 2, 2) == torch.arange(columns)[:, None, None]).all()
        if is_tiled and in_order and first.sort().values.equal(torch.arange(size)):
            order = first.argsort()
            return size, None if order.equal(torch.arange(size)) else order
    return None


def _halves(q: Tensor) -> Tensor:
    """A matrix as the kernel packs it, each byte's low and high half: (bytes, 2)."""
    packed = aten._convert_weight_to_int4pack_for_cpu(q.int().contiguous(), 1).flatten()
    return torch.stack((packed & 15, packed >> 4), dim=-1).long()
