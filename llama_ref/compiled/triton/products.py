"""Triton kernels for decoding: weights are read once, in the format in which they are stored.

`matvec` is one row times a matrix (N, K) in bfloat16/float16, int8 or int4, fused with its neighbours in
a layer: RMSNorm before; residual, silu(gate) * up, or RoPE and the cache write after. `matmul` takes 2
to 64 rows of a quantized matrix, dequantizes in registers, and is fused with what comes after. Both
accumulate in float32.
"""

import inspect
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_ref.compiled.triton.ptx import unpack4, unpack8
from llama_ref.device import AMPERE, HOPPER

MOST_ROWS = 64  # that `matmul` takes
BLOCK_WEIGHTS = 1 << 26  # dequantized at a time for more rows
JOINED = 1024  # sums joined by a program
FEW_ROWS, MANY_ROWS = 2048, 16384  # of a matrix
PDL_COMPILES = "_semantic" in inspect.signature(gdc_wait).parameters  # False in Triton 3.4
LARGE = 1 << 25  # weights of a matrix whose programs fill a whole card several times


@triton.jit
def _input(x, gain, k, K: tl.constexpr):
    """x at columns k times the norm's weight, and the squares of x; float32."""
    value = tl.load(x + k, mask=k < K, other=0).to(tl.float32)
    scaled = value
    if gain is not None:
        scaled = value * tl.load(gain + k, mask=k < K, other=0).to(tl.float32)
    return scaled, value * value


@triton.jit
def _bits(words, at: tl.constexpr, MASK: tl.constexpr, x):
    """The number in the bits MASK << `at`, all below bit 20, times x, times 2^-49.

    Read as a float32, these bits are the denormal number * 2^(at - 149), without a conversion.
    """
    return (words & (MASK << at)).to(tl.float32, bitcast=True) * (x * (2.0 ** (100 - at)))


@triton.jit
def _split4(x, COUNT: tl.constexpr):
    """The four columns of x (COUNT, 4)."""
    even, odd = tl.split(tl.reshape(x, (COUNT, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _dot8(words, low, high, COUNT: tl.constexpr):
    """The eight numbers of each word (ROWS, COUNT) times low and high (COUNT, 4), summed, times 2^-49."""
    x0, x2, x4, x6 = _split4(low, COUNT)
    x1, x3, x5, x7 = _split4(high, COUNT)
    y = _bits(words, 0, 15, x0) + _bits(words, 4, 15, x1) + _bits(words, 8, 15, x2) + _bits(words, 12, 15, x3)
    y += _bits(words, 16, 15, x4)
    rest = words >> 12
    return y + _bits(rest, 8, 15, x5) + _bits(rest, 12, 15, x6) + _bits(rest, 16, 15, x7)


@triton.jit
def _dot4(words, x, COUNT: tl.constexpr):
    """The four numbers of each word (ROWS, COUNT), 128 added to each, times x (COUNT, 4), summed, times 2^-49."""
    x0, x1, x2, x3 = _split4(x, COUNT)
    biased = words ^ 0x80808080
    rest = biased >> 16
    return _bits(biased, 0, 255, x0) + _bits(biased, 8, 255, x1) + _bits(rest, 0, 255, x2) + _bits(rest, 8, 255, x3)


@triton.jit
def _scales(scale, zero, row, first, K: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Scales and zeros (rows, GROUPS) from group `first` on; without zeros, the scales twice."""
    group = first + tl.arange(0, GROUPS)
    inside = (group < K // GROUP)[None, :]
    places = row[:, None] * (K // GROUP) + group
    s = tl.load(scale + places, mask=inside, other=0)
    z = s
    if zero is not None:
        z = tl.load(zero + places, mask=inside, other=0)
    return s, z


@triton.jit
def _matvec(
    out, x, w, scale, zero, gain, residual, cos, sin, keys, values, position,
    N, eps, head_stride, place_stride, q_rows, k_rows,
    K: tl.constexpr, GROUP: tl.constexpr, WORD: tl.constexpr, GATED: tl.constexpr, HEAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # WORD numbers are read at once: eight int4 (the low nibbles are 4 columns, the high ones the 4
    # columns half a group further), four int8, or one.
    COLUMNS: tl.constexpr = K // WORD
    WIDTH: tl.constexpr = GROUP // 8 if GROUP else BLOCK  # words of a group
    GROUPS: tl.constexpr = BLOCK // WIDTH
    if PDL:  # let the next kernel start loading its weights
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    stored = tl.minimum(row, N - 1)
    if GATED:  # (gate, up) pairs: rows n and n + N/2
        stored = stored % 2 * (N // 2) + stored // 2
    column = tl.arange(0, BLOCK)
    pointers = w + stored[:, None].to(tl.int64) * COLUMNS + column
    tile = tl.load(pointers, mask=(column < COLUMNS)[None, :], other=0, eviction_policy="evict_first")
    # Global memory is slow, so loads start early: weights and scales now, then what the end needs.
    if GROUP:
        s, z = _scales(scale, zero, stored, 0, K, GROUP, GROUPS)
    elif scale is not None:
        s = tl.load(scale + stored)
    if PDL:  # x is written by the previous kernel
        gdc_wait()
    if residual is not None:
        added = tl.load(residual + row, mask=row < N, other=0)
    if cos is not None:  # ROWS divides HEAD: all rows of a program belong to one head of q, k or v
        pair = tl.program_id(0) * ROWS % HEAD // 2 + tl.arange(0, ROWS // 2)
        token = tl.load(position)
        c, d = tl.load(cos + token * (HEAD // 2) + pair), tl.load(sin + token * (HEAD // 2) + pair)
    squares, sums_of_x = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if GROUP:
        acc = tl.zeros((ROWS, GROUPS), tl.float32)
    else:
        acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        weights, at = tile, start + column
        if GROUP:
            step = s.to(tl.float32)
            offset = -8 * step if zero is None else z.to(tl.float32) - 8 * step
        if BLOCK < COLUMNS:  # load the next tile while this one is multiplied
            inside = (at + BLOCK < COLUMNS)[None, :]
            tile = tl.load(pointers + (start + BLOCK), mask=inside, other=0, eviction_policy="evict_first")
            if GROUP:
                s, z = _scales(scale, zero, stored, (start + BLOCK) // WIDTH, K, GROUP, GROUPS)
        if GROUP:
            k = (at // WIDTH * GROUP + at % WIDTH * 4)[:, None] + tl.arange(0, 4)
            x_low, squares_low = _input(x, gain, k, K)
            x_high, squares_high = _input(x, gain, k + GROUP // 2, K)
            y = _dot8(weights, x_low, x_high, BLOCK)
            dots = tl.sum(tl.reshape(y, (ROWS, GROUPS, WIDTH)), 2) * 2.0**49
            sums = tl.sum(tl.reshape(tl.sum(x_low + x_high, 1), (GROUPS, WIDTH)), 1)
            acc += dots * step + offset * sums
            squares += tl.sum(squares_low + squares_high, 1)
        elif WORD == 4:
            x_at, squares_at = _input(x, gain, at[:, None] * 4 + tl.arange(0, 4), K)
            acc += _dot4(weights, x_at, BLOCK)
            sums_of_x += tl.sum(x_at, 1)
            squares += tl.sum(squares_at, 1)
        else:
            x_at, squares_at = _input(x, gain, at, K)
            acc += weights.to(tl.float32) * x_at
            squares += squares_at
    y = tl.sum(acc, 1)
    if WORD == 4:
        y = y * 2.0**49 - 128 * tl.sum(sums_of_x, 0)
    if scale is not None and not GROUP:
        y *= s
    if gain is not None:
        y *= tl.rsqrt(tl.sum(squares, 0) / K + eps)
    if GATED:
        gate, up = tl.split(tl.reshape(y, (ROWS // 2, 2)))
        row = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
        tl.store(out + row, gate / (1 + tl.exp(-gate)) * up, mask=row < N // 2)
    elif cos is not None:
        even, odd = tl.split(tl.reshape(y, (ROWS // 2, 2)))
        turned = tl.reshape(tl.join(even * c - odd * d, even * d + odd * c), (ROWS,))
        first = tl.program_id(0) * ROWS
        if first < q_rows:
            tl.store(out + row, turned)
        else:
            of_k = (first - q_rows) % k_rows + tl.arange(0, ROWS)
            place = of_k // HEAD * head_stride + token * place_stride + of_k % HEAD
            if first < q_rows + k_rows:
                tl.store(keys + place, turned)
            else:
                tl.store(values + place, y)
    else:
        if residual is not None:
            y += added.to(tl.float32)
        tl.store(out + row, y, mask=row < N)


@triton.jit
def _spread(scales, ROWS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr):
    """Repeat each group's number for its bytes: (ROWS, GROUPS) -> (ROWS, GROUPS * HALF)."""
    return tl.reshape(tl.broadcast_to(scales[:, :, None], (ROWS, GROUPS, HALF)), (ROWS, GROUPS * HALF))


@triton.jit(do_not_specialize=["M"])
def _matmul(
    out, x, w, scale, zero, residual, M, N,
    K: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, UNPACK: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = K // 2 if GROUP else K
    HALF: tl.constexpr = GROUP // 2 if GROUP else BLOCK
    GROUPS: tl.constexpr = BLOCK // HALF
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    stored = tl.minimum(row, N - 1)
    if GATED:  # (gate, up) pairs: rows n and n + N/2
        stored = stored % 2 * (N // 2) + stored // 2
    token = tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK)
    pointers = w + stored[:, None].to(tl.int64) * COLUMNS + column
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    # Each program_id(1) takes every SPLIT-th block, and writes its sum to a separate slice.
    for step in range(0, COLUMNS, SPLIT * BLOCK):
        start = step + tl.program_id(1) * BLOCK
        at = start + column
        weights = tl.load(pointers + start, mask=(at < COLUMNS)[None, :], other=0, eviction_policy="evict_first")
        k = at // HALF * GROUP + at % HALF if GROUP else at
        x_at = tl.load(x + token * K + k[:, None], mask=(token < M) & (k < K)[:, None], other=0)  # (BLOCK, TOKENS)
        if GROUP:
            s, z = _scales(scale, zero, stored, start // HALF, K, GROUP, GROUPS)
            if UNPACK is not None:
                offset = tl.zeros_like(s) if zero is None else z
                low, high = tl.inline_asm_elementwise(
                    UNPACK, "=r,=r,=r,=r,r,r,r,r,r",
                    [weights, _spread(s, ROWS, GROUPS, HALF), _spread(offset, ROWS, GROUPS, HALF)],
                    dtype=(x.dtype.element_ty, x.dtype.element_ty), is_pure=True, pack=4,
                )  # fmt: skip
            else:
                wide = s.to(tl.float32)
                offset = -8 * wide if zero is None else z.to(tl.float32) - 8 * wide
                wide, offset = _spread(wide, ROWS, GROUPS, HALF), _spread(offset, ROWS, GROUPS, HALF)
                low = ((weights & 15).to(tl.float32) * wide + offset).to(x.dtype.element_ty)
                high = ((weights >> 4).to(tl.float32) * wide + offset).to(x.dtype.element_ty)
            acc = tl.dot(low, x_at, acc, input_precision="ieee")
            x_high = tl.load(x + token * K + (k + HALF)[:, None], mask=(token < M) & (k < K)[:, None], other=0)
            acc = tl.dot(high, x_high, acc, input_precision="ieee")
        else:
            if UNPACK is not None:
                numbers = tl.inline_asm_elementwise(
                    UNPACK, "=r,=r,r", [weights], dtype=x.dtype.element_ty, is_pure=True, pack=4
                )
            else:
                numbers = weights.to(tl.float32).to(x.dtype.element_ty)
            acc = tl.dot(numbers, x_at, acc, input_precision="ieee")
    if scale is not None and not GROUP:
        acc *= tl.load(scale + stored)[:, None]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (ROWS // 2, 2, TOKENS)), (0, 2, 1)))
        row = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
        place = token * (N // 2) + row[:, None]
        tl.store(out + place, gate / (1 + tl.exp(-gate)) * up, mask=(token < M) & (row < N // 2)[:, None])
    else:
        inside = (token < M) & (row < N)[:, None]
        if residual is not None:
            acc += tl.load(residual + token * N + row[:, None], mask=inside, other=0).to(tl.float32)
        tl.store(out + (tl.program_id(1) * M + token) * N + row[:, None], acc, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _join(out, parts, residual, count, SPLIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The sum of parts (SPLIT, count), plus the residual (count,)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    y = tl.zeros((BLOCK,), tl.float32)
    if residual is not None:
        y += tl.load(residual + at, mask=inside, other=0).to(tl.float32)
    for part in tl.static_range(SPLIT):
        y += tl.load(parts + part * count + at, mask=inside, other=0)
    tl.store(out + at, y, mask=inside)


def _matvec_config(bits: int, N: int, K: int) -> tuple[int, int, int]:
    """Rows per program, words at a time (of 8 int4, 4 int8 or one number) and warps: the fastest on an H200."""
    if bits == 4:
        if K > 4096:
            return (16, 256, 8) if N * K > LARGE else (8, 256, 4) if N > FEW_ROWS else (8, 512, 4)
        return (16, 128, 4) if K > 2048 and (N > K or N * K > LARGE) else (16, 256, 4)
    if bits == 8:
        if N <= FEW_ROWS:
            return 8, 512, 8
        return (16, 256, 4) if N <= K else (8, 256, 2) if K > 2048 else (8, 512, 4)
    if N > K and K in (2048, 4096):
        return 4, K, K // 512
    return (2, 1024, 2) if N > K else (2, 2048, 8)


def _matmul_config(bits: int, M: int, N: int, itemsize: int, hopper: bool) -> tuple[int, int, int, int, int]:
    """Rows per program, bytes of each at a time, warps, programs per row, pipeline stages: the fastest on an H200.

    Older cards have less shared memory (99 KB at least) and get smaller tiles.
    """
    if itemsize == 4:
        return 32, 64, 4, 1, 2
    if not hopper:
        return (64, 64, 4, 2, 3) if bits == 4 else (32, 128, 4, 2, 4) if M <= 32 else (64, 128, 4, 1, 4)
    if M <= 16:
        return (64, 128, 4, 4, 3) if bits == 4 else (32, 256, 4, 4, 3)
    if bits == 8:
        return (32, 128, 4, 1, 5) if N > MANY_ROWS else (64, 256, 4, 2, 3)
    return (128, 128, 8, 1, 3) if N > MANY_ROWS else (64, 256 if M <= 32 else 128, 4, 2, 3)


@cache
def has_tensor_cores(device: torch.device) -> bool:
    """Whether to use `matmul`: without Ampere's matrix instructions it spills registers."""
    return device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) >= AMPERE


@cache
def has_pdl(device: torch.device) -> bool:
    """Whether kernels may load weights before the previous one ends (Hopper's dependent launch)."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and PDL_COMPILES and torch.cuda.get_device_capability(device) >= HOPPER


def _group(scale: Tensor | None, K: int) -> int:
    """Weights that share a scale in a row of four-bit numbers; 0 for other matrices."""
    return 0 if scale is None or scale.dim() == 1 else K // scale.shape[1]


def matvec(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, zero: Tensor | None = None, *,
    gain: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None, gated: bool = False,
    rope: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None,
    config: tuple[int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """x (K,) times weight (N, K): (N,), or (N/2,) if gated.

    weight: in x's dtype; int8 with scale (N,); or uint8 (N, K/2) with scale and optional zero
    (N, K/G), as `pack` makes them.
    gain: x is first normed (RMSNorm) with this weight (K,). residual (N,) is added.
    gated: weight is w1 over w3, and the result is silu(w1 x) * (w3 x).
    rope: cos, sin (S, hd/2) float32, keys, values (heads, S, hd) with the same strides, and position
    (1,): weight is wq, wk, wv; the rotated q is returned, k and v are written to the cache there.
    """
    N, K = weight.shape[0], x.shape[-1]
    cos = sin = keys = values = position = None
    out_rows, head, strides, k_rows = N // 2 if gated else N, 1, (0, 0), 1
    if rope is not None:
        cos, sin, keys, values, position = rope
        head, strides, k_rows = keys.shape[2], (keys.stride(0), keys.stride(1)), keys.shape[0] * keys.shape[2]
        out_rows = N - 2 * k_rows
    out = torch.empty(out_rows, dtype=x.dtype, device=x.device)
    group = _group(scale, K)
    rows, block, warps = config or _matvec_config(4 if group else 8 * weight.element_size(), N, K)
    while head % rows and rope is not None:  # all rows of a program belong to one head
        rows //= 2
    word = 8 if group else 4 if weight.dtype == torch.int8 and K % 4 == 0 else 1
    if word > 1:
        weight = weight.view(torch.uint32)
    pdl = has_pdl(x.device)
    _matvec[(triton.cdiv(N, rows),)](
        out, x, weight, scale, zero, gain, residual, cos, sin, keys, values, position, N, eps, *strides, out_rows, k_rows,
        K, group, word, gated, head, rows, block, pdl, num_warps=warps, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out


def matmul(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, zero: Tensor | None = None, *,
    residual: Tensor | None = None, gated: bool = False,
    config: tuple[int, int, int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """x (M, K), M up to 64, times a quantized weight (N, K): (M, N), or (M, N/2) if gated.

    `residual` (M, N) and `gated` are as in `matvec`.
    """
    (M, K), N, pdl = x.shape, weight.shape[0], has_pdl(x.device)
    group = _group(scale, K)
    rows, block, warps, split, stages = config or _matmul_config(4 if group else 8, M, N, x.element_size(), pdl)
    if gated:
        split = 1
    if group // 2 > block:  # whole groups at a time, in fewer stages
        block, stages = group // 2, 2
    out = torch.empty(M, N // 2 if gated else N, dtype=x.dtype, device=x.device)
    parts = out if split == 1 else torch.empty(split, M, N, dtype=torch.float32, device=x.device)
    tokens = max(16, triton.next_power_of_2(M))
    launch = {"launch_pdl": True} if pdl else {}
    _matmul[(triton.cdiv(N, rows), split)](
        parts, x, weight, scale, zero, residual if split == 1 else None, M, N,
        K, group, gated, _unpack(x.dtype, scale), tokens, rows, block, split, pdl,
        num_warps=warps, num_stages=stages, **launch,
    )  # fmt: skip
    if split > 1:
        _join[(triton.cdiv(M * N, JOINED),)](out, parts, residual, M * N, split, JOINED, pdl, num_warps=4, **launch)
    return out


def _unpack(dtype: torch.dtype, scale: Tensor | None) -> str | None:
    """The PTX that unpacks a matrix's words; None where Triton's own operations do it."""
    if scale is None or dtype == torch.float32 or triton.knobs.runtime.interpret or torch.version.hip is not None:
        return None
    if scale.dim() == 1:
        return unpack8(dtype)
    return unpack4(dtype) if scale.dtype == dtype else None


@triton.jit
def _dequantize(out, w, scale, zero, K: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    COLUMNS: tl.constexpr = K // 2 if GROUP else K
    HALF: tl.constexpr = GROUP // 2 if GROUP else 1
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < COLUMNS
    q = tl.load(w + row * COLUMNS + column, mask=inside, other=0)
    if GROUP:
        group = row * (K // GROUP) + column // HALF
        s = tl.load(scale + group, mask=inside, other=0).to(tl.float32)
        z = -8 * s
        if zero is not None:
            z += tl.load(zero + group, mask=inside, other=0).to(tl.float32)
        at = out + row * K + column // HALF * GROUP + column % HALF
        tl.store(at, (q & 15).to(tl.float32) * s + z, mask=inside)
        tl.store(at + HALF, (q >> 4).to(tl.float32) * s + z, mask=inside)
    else:
        tl.store(out + row * K + column, q.to(tl.float32) * tl.load(scale + row), mask=inside)


def dequantize(weight: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """An int8 or int4 matrix as in `matvec`: (N, K) in `dtype`."""
    N = len(weight)
    K = weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
    out = torch.empty(N, K, dtype=dtype, device=weight.device)
    group = _group(scale, K)
    _dequantize[(N, triton.cdiv(weight.shape[1], 1024))](out, weight, scale, zero, K, group, 1024, num_warps=4)
    return out


def product(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """x (M, K) times a quantized matrix as in `matvec`, for any number of rows: (M, N)."""
    if len(x) == 1:
        return matvec(x[0], weight, scale, zero)[None]
    if len(x) <= MOST_ROWS and has_tensor_cores(x.device):
        return matmul(x.contiguous(), weight, scale, zero)
    step = max(1, BLOCK_WEIGHTS // x.shape[1])
    weights, scales = weight.split(step), scale.split(step)
    zeros = [None] * len(weights) if zero is None else zero.split(step)
    parts = [F.linear(x, dequantize(*block, x.dtype)) for block in zip(weights, scales, zeros, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
