"""Triton kernels for decoding: weights are read once, in the format in which they are stored.

`matvec` is one row times a matrix (N, K) in bfloat16/float16, int8 or int4, fused with its neighbours in
a layer: RMSNorm before; residual, silu(gate) * up, or RoPE and the cache write after. `matmul` takes 2
to 64 rows and dequantizes in registers. Both accumulate in float32.
"""

from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_ref.device import AMPERE, HOPPER

MOST_ROWS = 64  # of `matmul`
BLOCK_WEIGHTS = 1 << 26  # dequantized at a time for more rows
LARGE = 1 << 25  # weights of a matrix with several rounds of programs for a whole card


@triton.jit
def _input(x, gain, k, K: tl.constexpr):
    """x at columns k times the norm's weight, and the squares of x; float32."""
    value = tl.load(x + k, mask=k < K, other=0).to(tl.float32)
    scaled = value
    if gain is not None:
        scaled = value * tl.load(gain + k, mask=k < K, other=0).to(tl.float32)
    return scaled, value * value


@triton.jit
def _nibbles(words, at: tl.constexpr, x):
    """The four bits at `at` (0 to 16) times x, times 2^-49.

    Bits of a word are a float32 of q * 2^(at - 149), a denormal number, without being converted.
    """
    return (words & (15 << at)).to(tl.float32, bitcast=True) * (x * (2.0 ** (100 - at)))


@triton.jit
def _dot8(words, low, high, COUNT: tl.constexpr):
    """The eight numbers of each word (ROWS, COUNT) times low and high (COUNT, 4), summed, times 2^-49."""
    even, odd = tl.split(tl.reshape(low, (COUNT, 2, 2)))
    x0, x4 = tl.split(even)
    x2, x6 = tl.split(odd)
    even, odd = tl.split(tl.reshape(high, (COUNT, 2, 2)))
    x1, x5 = tl.split(even)
    x3, x7 = tl.split(odd)
    y = _nibbles(words, 0, x0) + _nibbles(words, 4, x1) + _nibbles(words, 8, x2) + _nibbles(words, 12, x3)
    y += _nibbles(words, 16, x4)
    rest = words >> 12
    return y + _nibbles(rest, 8, x5) + _nibbles(rest, 12, x6) + _nibbles(rest, 16, x7)


@triton.jit
def _matvec(
    out, x, w, scale, zero, gain, residual, cos, sin, keys, values, position,
    N, eps, head_stride, place_stride, q_rows, k_rows,
    K: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, HEAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # Four bits are read as words of 8: the low nibbles are 4 columns, the high ones those half a group further.
    COLUMNS: tl.constexpr = K // 8 if GROUP else K
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
    tile = tl.load(pointers, mask=column < COLUMNS, other=0, eviction_policy="evict_first")
    if PDL:  # x is written by the kernel before
        gdc_wait()
    squares = tl.zeros((BLOCK,), tl.float32)
    if GROUP:
        acc = tl.zeros((ROWS, GROUPS), tl.float32)
    else:
        acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        weights, at = tile, start + column
        if BLOCK < COLUMNS:  # load the next tile while this one is multiplied
            tile = tl.load(pointers + (start + BLOCK), mask=at + BLOCK < COLUMNS, other=0, eviction_policy="evict_first")
        if GROUP:
            group = start // WIDTH + tl.arange(0, GROUPS)
            places = stored[:, None] * (K // GROUP) + group
            s = tl.load(scale + places, mask=group < K // GROUP, other=0).to(tl.float32)
            z = -8 * s
            if zero is not None:
                z += tl.load(zero + places, mask=group < K // GROUP, other=0).to(tl.float32)
            k = (at // WIDTH * GROUP + at % WIDTH * 4)[:, None] + tl.arange(0, 4)
            x_low, squares_low = _input(x, gain, k, K)
            x_high, squares_high = _input(x, gain, k + GROUP // 2, K)
            y = _dot8(weights, x_low, x_high, BLOCK)
            dots = tl.sum(tl.reshape(y, (ROWS, GROUPS, WIDTH)), 2) * 2.0**49
            sums = tl.sum(tl.reshape(tl.sum(x_low + x_high, 1), (GROUPS, WIDTH)), 1)
            acc += dots * s + z * sums
            squares += tl.sum(squares_low + squares_high, 1)
        else:
            x_at, squares_at = _input(x, gain, at, K)
            acc += weights.to(tl.float32) * x_at
            squares += squares_at
    y = tl.sum(acc, 1)
    if scale is not None and not GROUP:
        y *= tl.load(scale + stored)
    if gain is not None:
        y *= tl.rsqrt(tl.sum(squares, 0) / K + eps)
    if GATED:
        gate, up = tl.split(tl.reshape(y, (ROWS // 2, 2)))
        row = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
        tl.store(out + row, gate / (1 + tl.exp(-gate)) * up, mask=row < N // 2)
    elif cos is not None:  # ROWS divides HEAD: all rows of a program belong to one head of q, k or v
        even, odd = tl.split(tl.reshape(y, (ROWS // 2, 2)))
        pair = tl.program_id(0) * ROWS % HEAD // 2 + tl.arange(0, ROWS // 2)
        at = tl.load(position)
        c, s = tl.load(cos + at * (HEAD // 2) + pair), tl.load(sin + at * (HEAD // 2) + pair)
        turned = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (ROWS,))
        first = tl.program_id(0) * ROWS
        if first < q_rows:
            tl.store(out + row, turned)
        else:
            of_k = (first - q_rows) % k_rows + tl.arange(0, ROWS)
            place = of_k // HEAD * head_stride + at * place_stride + of_k % HEAD
            if first < q_rows + k_rows:
                tl.store(keys + place, turned)
            else:
                tl.store(values + place, y)
    else:
        if residual is not None:
            y += tl.load(residual + row, mask=row < N).to(tl.float32)
        tl.store(out + row, y, mask=row < N)


@triton.jit(do_not_specialize=["M"])
def _matmul(
    out, x, w, scale, zero, M, N,
    K: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr,
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
    token = tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK)
    pointers = w + stored[:, None].to(tl.int64) * COLUMNS + column
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    # Program_id(1) takes every SPLIT-th block; its sum goes to a slice of its own.
    for step in range(0, COLUMNS, SPLIT * BLOCK):
        start = step + tl.program_id(1) * BLOCK
        at = start + column
        weights = tl.load(pointers + start, mask=at < COLUMNS, other=0, eviction_policy="evict_first")
        k = at // HALF * GROUP + at % HALF if GROUP else at
        x_at = tl.load(x + token * K + k[:, None], mask=(token < M) & (k < K)[:, None], other=0)  # (BLOCK, TOKENS)
        if GROUP:
            group = start // HALF + tl.arange(0, GROUPS)
            places = stored[:, None] * (K // GROUP) + group
            s = tl.load(scale + places, mask=group < K // GROUP, other=0).to(tl.float32)
            z = -8 * s
            if zero is not None:
                z += tl.load(zero + places, mask=group < K // GROUP, other=0).to(tl.float32)
            s = tl.reshape(tl.broadcast_to(s[:, :, None], (ROWS, GROUPS, HALF)), (ROWS, BLOCK))
            z = tl.reshape(tl.broadcast_to(z[:, :, None], (ROWS, GROUPS, HALF)), (ROWS, BLOCK))
            low = ((weights & 15).to(tl.float32) * s + z).to(x.dtype.element_ty)
            high = ((weights >> 4).to(tl.float32) * s + z).to(x.dtype.element_ty)
            acc = tl.dot(low, x_at, acc, input_precision="ieee")
            x_high = tl.load(x + token * K + (k + HALF)[:, None], mask=(token < M) & (k < K)[:, None], other=0)
            acc = tl.dot(high, x_high, acc, input_precision="ieee")
        else:
            acc = tl.dot(weights.to(tl.float32).to(x.dtype.element_ty), x_at, acc, input_precision="ieee")
    if scale is not None and not GROUP:
        acc *= tl.load(scale + stored)[:, None]
    place = (tl.program_id(1) * M + token) * N + row[:, None]
    tl.store(out + place, acc, mask=(token < M) & (row < N)[:, None])


def _matvec_config(bits: int, N: int, K: int) -> tuple[int, int, int]:
    """Rows per program, columns at a time (words of eight for int4) and warps: the fastest on an H200."""
    if bits == 4:
        words = K // 8
        if words % 512 == 0 and not (words == 512 and N * K > LARGE):
            return 8, 512, 4
        return (16, 256, 4 if words == 256 else 8) if words % 256 == 0 and words != 512 else (16, 128, 4)
    if bits == 8:
        if K == 4096:
            return (4, 512, 2) if N * K > LARGE else (2, 4096, 4)
        return (2, 2048, 4) if K > 2048 or N * K < LARGE else (4, 1024, 4)
    if K == 4096 and bits == 16:
        return (2, 4096, 8) if N > K else (2, 2048, 4)
    return (2, 2048, 4) if K > 4096 else (2, 1024, 4)


def _matmul_config(bits: int, M: int, itemsize: int) -> tuple[int, int, int, int, int]:
    """Rows per program, columns at a time, warps, programs per row, pipeline stages: the fastest on an H200."""
    if itemsize == 4:
        return 32, 64, 4, 1, 2
    if bits == 4:
        return 64, 64, 4, 2, 5
    return (32, 128, 4, 2, 4) if M <= 32 else (64, 128, 4, 1, 4)


@cache
def has_tensor_cores(device: torch.device) -> bool:
    """Whether to use `matmul`: without Ampere's matrix instructions it spills registers."""
    return device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) >= AMPERE


@cache
def has_pdl(device: torch.device) -> bool:
    """Programmatic dependent launch: a kernel loads weights before the previous one has finished (Hopper)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= HOPPER


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

    weight: x's dtype; int8 with scale (N,); or uint8 (N, K/2) with scale and zero (N, K/G), as `pack` makes them, or no zero.
    gain: x is first normed (RMSNorm) with this weight (K,). residual (N,) is added. gated: weight is w1 over w3, and the
    result silu(w1 x) * (w3 x). rope: cos, sin (S, hd/2) float32, keys, values (heads, S, hd) of the same strides and
    position (1,): weight is wq, wk, wv; the turned q is returned, k and v are written to the cache at the position.
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
    if group:
        weight = weight.view(torch.uint32)
    pdl = has_pdl(x.device)
    _matvec[(triton.cdiv(N, rows),)](
        out, x, weight, scale, zero, gain, residual, cos, sin, keys, values, position, N, eps, *strides, out_rows, k_rows,
        K, group, gated, head, rows, block, pdl, num_warps=warps, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out


def matmul(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, zero: Tensor | None = None, *,
    config: tuple[int, int, int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """x (M, K), M up to 64, times weight (N, K) as in `matvec`: (M, N)."""
    (M, K), N = x.shape, weight.shape[0]
    group = _group(scale, K)
    rows, block, warps, split, stages = config or _matmul_config(4 if group else 8, M, x.element_size())
    if group // 2 > block:  # whole groups at a time, in fewer stages
        block, stages = group // 2, 2
    dtype = x.dtype if split == 1 else torch.float32
    out = torch.empty(split, M, N, dtype=dtype, device=x.device)
    tokens = max(16, triton.next_power_of_2(M))
    pdl = has_pdl(x.device)
    _matmul[(triton.cdiv(N, rows), split)](
        out, x, weight, scale, zero, M, N, K, group, tokens, rows, block, split, pdl,
        num_warps=warps, num_stages=stages, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out[0] if split == 1 else out.sum(0).to(x.dtype)


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
