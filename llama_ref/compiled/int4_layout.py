"""Int4 matrices in the layout of the compiled decode step: eight numbers in the nibbles of each int32.

128 columns of a row are 16 words. Nibble p of word l is column 16·p + l, so that 16 lanes read a plane
of 16 neighbouring columns by masking alone: an unshifted nibble is its number times 16^p, and that
factor is folded into the input. Long rows are cut into pieces (int8_layout.py).
"""

from collections.abc import Callable
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ref.compiled.int8_layout import PIECE, in_pieces
from llama_ref.machine import memory
from llama_ref.quantization.linear import Int4Linear, QuantizedMatrix, wide_dtype

PLANES, LANES = 8, 16
COLUMNS = PLANES * LANES  # of a block
PACKED_ROWS = 1 << 10  # packed at a time
SIGN_PLANE = PLANES - 1  # the nibble with the word's sign bit: a number from -8 to 7
MASKS = [15 << (4 * p) for p in range(SIGN_PLANE)] + [-(1 << 28)]


def matrix(words: Tensor, scale: Tensor, zero: Tensor | None, like: Tensor) -> Tensor:
    """The weights (N, P · blocks · 128) in `like`'s dtype; memory-bound when compiled."""
    wide = torch.promote_types(wide_dtype(like.dtype), scale.dtype)
    plane = torch.arange(PLANES, device=words.device)[:, None]
    q = (words[:, :, :, None] >> (4 * plane)) & 15  # (P, N, blocks, 8, 16)
    q = (q ^ (8 * (plane == SIGN_PLANE))) - 8
    q = q.to(wide).unflatten(3, (scale.shape[-1], -1))  # (P, N, blocks, groups, planes of a group, 16)
    w = q * scale[..., None, None].to(wide)
    if zero is not None:
        w = w + zero[..., None, None].to(wide)
    return w.to(like.dtype).transpose(0, 1).flatten(1)


class PlanarInt4Linear(QuantizedMatrix):
    """An Int4Linear as `words` int32 (P, N, blocks, 16), `scale` and `zero` (P, N, blocks, groups).

    Rows are padded to whole blocks; groups larger than a block are repeated for each block. For prompts
    `matrix`, the function of that name or its compiled form, dequantizes some rows at a time.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, module: Int4Linear, matrix: Callable[..., Tensor] = matrix):
        super().__init__()
        self.matrix = matrix
        self.shape = module.shape
        self.group = min(module.group, COLUMNS)
        N, K = self.shape
        self.n_blocks = -(-K // COLUMNS)
        words = memory.empty(N, self.n_blocks, LANES, dtype=torch.int32, device=module.packed.device)
        for start in range(0, N, PACKED_ROWS):
            rows = slice(start, start + PACKED_ROWS)
            words[rows] = _to_words(F.pad(module.unpacked(rows), (0, self.n_blocks * COLUMNS - K), value=8))
        self.register_buffer("words", self._in_pieces(words))
        self.register_buffer("scale", self._by_block(module.scale))
        self.register_buffer("zero", None if module.zero is None else self._by_block(module.zero))

    def _by_block(self, values: Tensor) -> Tensor:
        """(N, K/G) -> (P, N, blocks, groups in a block)."""
        N, K = self.shape
        values = values.repeat_interleave(K // values.shape[1] // self.group, dim=1)  # one per `group` columns
        missing = self.n_blocks * COLUMNS // self.group - values.shape[1]
        return self._in_pieces(F.pad(values, (0, missing)).view(N, self.n_blocks, -1))

    def _in_pieces(self, rows: Tensor) -> Tensor:
        """(N, all blocks, …) -> (P, N, blocks of a piece, …)."""
        if not in_pieces(self.n_blocks * COLUMNS):
            return rows[None]
        return memory.contiguous(rows.unflatten(1, (-1, PIECE // COLUMNS)).transpose(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out), for prompts and batches."""
        return self._times_blocks(x)

    def dequantized(self, rows: slice, dtype: torch.dtype) -> Tensor:
        parts = (None if part is None else part[:, rows] for part in (self.words, self.scale, self.zero))
        return self.matrix(*parts, torch.empty(0, dtype=dtype, device=self.words.device))[:, : self.shape[1]]


def product(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """x float32 (P · blocks · 128,) times the matrix: float32 (N,).

    Written to compile to one loop over the words. As w = (q - 8) · scale + zero, a row is
    Σ (q x) · scale - Σ (8 x) · scale + Σ x · zero; the sign plane holds q - 8 already.
    """
    n_groups = scale.shape[-1]
    per_group = PLANES // n_groups
    x = x.view(-1, PLANES, LANES)
    powers = torch.tensor([16.0**-p for p in range(PLANES)], device=x.device)[:, None]
    eights = torch.tensor([-8.0] * SIGN_PLANE + [0.0], device=x.device)[:, None]
    by_piece = (len(words), 1, words.shape[2])  # (P, 1, blocks)
    scaled = materialize(x * powers).view(*by_piece, PLANES, LANES)
    offsets = materialize((x * eights).unflatten(1, (n_groups, per_group)).sum(2)).view(*by_piece, n_groups, LANES)
    sums = materialize(x.unflatten(1, (n_groups, per_group)).sum(2)).view(*by_piece, n_groups, LANES)

    def rows(words: Tensor, scale: Tensor, *zero: Tensor) -> Tensor:
        def dots(g: int) -> Tensor:  # (P, N/2, blocks, 16)
            planes = range(g * per_group, (g + 1) * per_group)
            return reduce(add, [(words & MASKS[p]).float() * scaled[..., p, :] for p in planes])

        if n_groups == 1:
            out = (dots(0) + offsets[..., 0, :]) * scale.float()
            if zero:
                out = out + sums[..., 0, :] * zero[0].float()
        else:
            out = reduce(add, [dots(g) * scale[..., g, None].float() for g in range(n_groups)])
        return out.sum((-1, -2)).sum(0)

    halves = zip(*(part.chunk(2, dim=1) for part in (words, scale, zero) if part is not None), strict=True)
    out = torch.cat([rows(*half) for half in halves])
    if n_groups > 1:  # with several scales per block, the offsets are a separate, smaller product
        offsets, sums = (
            materialize(part.sum(-1).flatten(2)[:, 0])[:, None] for part in (offsets, sums)
        )  # (P, 1, blocks · groups)
        of_groups = scale.flatten(2).float() * offsets
        if zero is not None:
            of_groups = of_groups + zero.flatten(2).float() * sums
        out = out + of_groups.sum(-1).sum(0)
    return out


def materialize(x: Tensor) -> Tensor:
    """The same values, written to memory: a compiler would recompute them for every row that uses them."""
    return torch.cat(x.chunk(2)) if len(x) > 1 else x


def _to_words(q: Tensor) -> Tensor:
    """0..15 uint8 (n, blocks · 128) -> int32 (n, blocks, 16)."""
    planes = q.view(len(q), -1, PLANES, LANES)
    words = torch.zeros(len(q), planes.shape[1], LANES, dtype=torch.int32, device=q.device)
    for p, plane in enumerate(planes.unbind(2)):
        words |= (plane ^ (8 if p == SIGN_PLANE else 0)).int() << 4 * p  # q - 8 in the sign plane, two's complement
    return words
