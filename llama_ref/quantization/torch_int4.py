"""Int4 matrices in the layout of PyTorch's CPU kernel.

`faster(module, dtype)` converts an Int4Linear if there is a kernel for it. Int8Linear needs no
conversion, and on CUDA our own kernels read both layouts as stored in folders
(compiled/triton/products.py), faster than PyTorch's `_weight_int4pack_mm` on an H200 (docs/cuda.md).
"""

from functools import cache

import torch
from torch import Tensor

from llama_ref.machine import memory
from llama_ref.quantization.linear import Int4Linear, QuantizedMatrix, has_few_rows, wide_dtype

aten = torch.ops.aten

TILE_ROWS = 64  # tiles have 16, 32 or 64 rows, depending on the processor; matrices are padded to 64
CONVERTED_WEIGHTS = 1 << 21  # converted at a time: packing needs each number as an int32
# Up to this many rows the kernel was faster than converting: in bfloat16 on two Zen 5 cores, in float32,
# which is not vectorized, on a Xeon.
FEW_ROWS = {torch.bfloat16: 128, torch.float32: 2}


def faster(module: Int4Linear, dtype: torch.dtype) -> QuantizedMatrix:
    """The matrix in the layout of PyTorch's kernel for inputs of `dtype`.

    Unchanged if there is no kernel.
    """
    device = module.packed.device
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float32) and _tile() is not None:
        return TiledInt4Linear(module, dtype)
    return module


class TiledInt4Linear(QuantizedMatrix):
    """An Int4Linear in the CPU kernel's layout: tiles of R rows, each stored column by column.

    `tiles` uint8 (N/R, K, R/2) and `scale_and_zero` (K/G, N, 2) in the dtype of the inputs; N is padded
    with zeros.
    """

    tiles: Tensor
    scale_and_zero: Tensor

    def __init__(self, module: Int4Linear, dtype: torch.dtype):
        super().__init__()
        self.shape, self.group = module.shape, module.group
        rows, _ = _known_tile()
        N, K = self.shape
        padded = -(-N // TILE_ROWS) * TILE_ROWS
        tiles = memory.empty(padded // rows, K, rows // 2, dtype=torch.uint8)
        step = max(1, CONVERTED_WEIGHTS // K // TILE_ROWS) * TILE_ROWS
        for start in range(0, padded, step):
            q = module.unpacked(slice(start, start + step)).int()
            q = torch.nn.functional.pad(q, (0, 0, 0, min(step, padded - start) - len(q)))
            block = aten._convert_weight_to_int4pack_for_cpu(q, 1)
            tiles[start // rows : (start + len(q)) // rows] = block.view(-1, K, rows // 2)
        scale_and_zero = torch.zeros(K // self.group, padded, 2, dtype=dtype, device="cpu")
        scale_and_zero[:, :N, 0] = module.scale.T
        if module.zero is not None:
            scale_and_zero[:, :N, 1] = module.zero.T
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
        """The numbers 0..15, one per byte: uint8 (N, K)."""
        start, stop, _ = rows.indices(self.shape[0])
        size, _ = _known_tile()
        tiles = self._by_row(slice(start // size, -(-stop // size)))  # (n, K, R)
        return tiles.transpose(1, 2).flatten(0, 1)[start % size :][: stop - start]

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        if not has_few_rows(x, FEW_ROWS) or x.dtype != self.scale_and_zero.dtype:
            parts = [x @ self._columns(rows, x.dtype) for rows in self._blocks()]
            return torch.cat(parts, dim=-1)
        packed = self.tiles.view(-1, self.shape[1] // 2)
        flat = x.reshape(-1, self.shape[1])
        out = aten._weight_int4pack_mm_for_cpu(flat, packed, self.group, self.scale_and_zero)
        return out[:, : self.shape[0]].unflatten(0, x.shape[:-1])

    def _by_row(self, tiles: slice) -> Tensor:
        """Unpack some tiles, with rows in order: uint8 (n, K, R)."""
        _, order = _known_tile()
        q = torch.cat((self.tiles[tiles] & 15, self.tiles[tiles] >> 4), dim=-1)
        return q if order is None else q.index_select(-1, order)

    def _columns(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Dequantize some rows, transposed (K, n) as in the tiles, because transposing is slow."""
        wide = wide_dtype(dtype)
        start, stop, _ = rows.indices(self.shape[0])
        size, _ = _known_tile()
        tiles = slice(start // size, -(-stop // size))
        q = self._by_row(tiles).to(wide).sub_(8).unflatten(1, (-1, self.group))  # (n, K/G, G, R)
        scale_and_zero = self.scale_and_zero[:, tiles.start * size : tiles.stop * size].to(wide)
        scale, zero = (part.contiguous() for part in scale_and_zero.unflatten(1, (-1, size)).movedim(0, 1).unbind(-1))
        weights = q.mul_(scale[:, :, None]).add_(zero[:, :, None]).flatten(1, 2)  # (n, K, R)
        return weights.transpose(0, 1).flatten(1)[:, start % size :][:, : stop - start].to(dtype)

    def dequantized(self, rows: slice, dtype: torch.dtype) -> Tensor:
        return self._columns(rows, dtype).T


@cache
def _tile() -> tuple[int, Tensor | None] | None:
    """This processor's tile layout: rows per tile, and their order in the low, then high nibbles.

    The packing is undocumented and differs between processors, so it is detected by packing a
    matrix whose numbers encode their own positions. The order is None if it is 0, 1, …; the result
    is None if there is no kernel or the layout is not made of tiles.
    """
    columns = 32
    row = torch.arange(TILE_ROWS, device="cpu")[:, None].expand(-1, columns)
    in_order = torch.arange(columns, device="cpu")
    column = in_order.expand(TILE_ROWS, -1)
    try:
        seen = [_halves(part) for part in (row % 16, row // 16, column % 16, column // 16)]
    except RuntimeError:
        return None  # no kernel
    rows, found_columns = seen[0] + 16 * seen[1], seen[2] + 16 * seen[3]  # (bytes, 2)
    for size in (16, 32, 64):
        places = rows.view(-1, columns, size // 2, 2)  # (tiles, K, R/2, low and high)
        first = places[0, 0].T.flatten()  # (R,)
        tile_starts = torch.arange(len(places), device="cpu")[:, None, None] * size
        is_tiled = (places.transpose(2, 3).flatten(2) == first + tile_starts).all()
        keeps_columns = (found_columns.view(-1, columns, size // 2, 2) == in_order[:, None, None]).all()
        rows_in_order = torch.arange(size, device="cpu")
        if is_tiled and keeps_columns and first.sort().values.equal(rows_in_order):
            order = first.argsort()
            return size, None if order.equal(rows_in_order) else order
    return None


def _known_tile() -> tuple[int, Tensor | None]:
    tile = _tile()
    assert tile is not None, "TiledInt4Linear exists only where `faster` found the layout"
    return tile


def _halves(q: Tensor) -> Tensor:
    """Pack a matrix as the kernel does.

    Returns the low and high nibble of each byte, (bytes, 2).
    """
    packed = aten._convert_weight_to_int4pack_for_cpu(q.int().contiguous(), 1).flatten()
    return torch.stack((packed & 15, packed >> 4), dim=-1).long()
