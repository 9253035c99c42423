"""Four-bit matrices in the layout of the compiled decode step: eight numbers in each int32, one in each of its eight nibbles.

128 columns of a row are 16 such words. Nibble p of word l is column 16·p + l, so that 16 lanes take a plane of 16 neighbours at
a time by masking alone: a nibble that stays where it is in the word is its number times 16^p, which is folded into the input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ref.quantization.modules import Int4Linear, QuantizedMatrix

PLANES, LANES = 8, 16
COLUMNS = PLANES * LANES  # of a block
PACKED_ROWS = 1 << 10  # at a time
SIGN_PLANE = PLANES - 1  # the nibble that holds the word's sign bit: as a number from -8 to 7
MASKS = [15 << (4 * p) for p in range(SIGN_PLANE)] + [-(1 << 28)]


class PlanarInt4Linear(QuantizedMatrix):
    """An Int4Linear as `words` int32 (N, blocks, 16), `scale` and `zero` bfloat16 (N, blocks, groups in a block).

    Rows are filled up to whole blocks with columns that count nothing. Wider groups than a block are said for each block.
    """

    def __init__(self, module: Int4Linear):
        super().__init__()
        self.shape = module.shape
        self.group = min(module.group, COLUMNS)
        N, K = self.shape
        self.n_blocks = -(-K // COLUMNS)
        words = torch.empty(N, self.n_blocks, LANES, dtype=torch.int32, device=module.packed.device)
        for start in range(0, N, PACKED_ROWS):
            rows = slice(start, start + PACKED_ROWS)
            words[rows] = _to_words(F.pad(module.unpacked(rows), (0, self.n_blocks * COLUMNS - K), value=8))
        self.register_buffer("words", words)
        self.register_buffer("scale", self._by_block(module.scale))
        self.register_buffer("zero", self._by_block(module.zero))

    def _by_block(self, values: Tensor) -> Tensor:
        """(N, K/G) -> (N, blocks, groups in a block)."""
        N, K = self.shape
        values = values.repeat_interleave(K // values.shape[1] // self.group, dim=1)  # one for each `group` columns
        missing = self.n_blocks * COLUMNS // self.group - values.shape[1]
        return F.pad(values, (0, missing)).view(N, self.n_blocks, -1)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out), for prompts and batches."""
        return self._times_blocks(x)

    def _rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        wide = torch.float32 if dtype == torch.float16 else dtype
        q = _from_words(self.words[rows]).to(wide).sub_(8).unflatten(-1, (-1, self.group))  # (n, blocks, groups, G)
        scale, zero = self.scale[rows, ..., None].to(wide), self.zero[rows, ..., None].to(wide)
        return q.mul_(scale).add_(zero).to(dtype).flatten(1)[:, : self.shape[1]]


def product(words: Tensor, scale: Tensor, zero: Tensor, x: Tensor) -> Tensor:
    """The matrix times x float32 (blocks · 128,): float32 (N,). To be compiled: every line is of one loop over the words.

    As w = (q - 8) · scale + zero, a row is Σ (q x) · scale - Σ (8 x) · scale + Σ x · zero; the sign's plane has q - 8 already.
    """
    n_groups = scale.shape[-1]
    per_group = PLANES // n_groups
    x = x.view(-1, PLANES, LANES)
    powers = torch.tensor([16.0**-p for p in range(PLANES)])[:, None]
    scaled = held(x * powers)
    eights = torch.tensor([-8.0] * SIGN_PLANE + [0.0])[:, None]
    offsets = held((x * eights).unflatten(1, (n_groups, per_group)).sum(2))  # (blocks, groups, 16)
    sums = held(x.unflatten(1, (n_groups, per_group)).sum(2))

    def rows(words: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        out = 0
        for g in range(n_groups):
            planes = range(g * per_group, (g + 1) * per_group)
            dots = sum((words & MASKS[p]).float() * scaled[:, p] for p in planes) + offsets[:, g]
            out = out + dots * scale[:, :, g, None].float() + sums[:, g] * zero[:, :, g, None].float()
        return out.sum((-1, -2))

    return torch.cat([rows(*halves) for halves in zip(words.chunk(2), scale.chunk(2), zero.chunk(2), strict=True)])


def held(x: Tensor) -> Tensor:
    """The same values, put into memory: without this a compiler works them out anew for every row that needs them."""
    return torch.cat(x.chunk(2)) if len(x) > 1 else x


def _to_words(q: Tensor) -> Tensor:
    """0..15 uint8 (n, blocks · 128) -> int32 (n, blocks, 16)."""
    planes = q.view(len(q), -1, PLANES, LANES).int()
    planes[:, :, SIGN_PLANE] ^= 8  # two's complement of q - 8
    shifts = 4 * torch.arange(PLANES, dtype=torch.int32, device=q.device)[:, None]
    return (planes << shifts).sum(2, dtype=torch.int32)


def _from_words(words: Tensor) -> Tensor:
    """The way back: uint8 (n, blocks, 128)."""
    pairs = words.view(torch.uint8).unflatten(-1, (LANES, PLANES // 2)).transpose(-1, -2)  # (n, blocks, 4, 16), low bytes first
    planes = torch.stack((pairs & 15, pairs >> 4), dim=3).flatten(2, 3)  # (n, blocks, 8, 16)
    planes[:, :, SIGN_PLANE] ^= 8
    return planes.flatten(2)
