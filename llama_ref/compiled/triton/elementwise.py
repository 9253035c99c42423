"""Triton kernels for the operations between a layer's products, and for reductions over logits.

They round where model.py rounds. Integers that change from call to call are not specialized, so
that a kernel is compiled once for each dtype and model.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x (N, D)."""
    out = torch.empty_like(x)
    N, D = x.shape
    _rms_norm[(N,)](x, weight, out, eps, D, triton.next_power_of_2(D), num_warps=8)
    return out


def rotate_and_store(
    qkv: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, n_heads: int
) -> Tensor:
    """Rotate the queries and keys in qkv (N, (H + 2K) · hd), store keys and values, return the queries (N, H, hd).

    N tokens are T of each of B rows, at int64 `positions` (N,); cos and sin float32 (S, hd/2) are
    of every position's angles. keys and values (B, K, S, hd) are one layer's cache, with the same
    strides, that of hd 1.
    """
    (B, K, _, hd), N = keys.shape, len(qkv)
    q = torch.empty(N, n_heads, hd, dtype=qkv.dtype, device=qkv.device)
    _rotate_and_store[(N, n_heads + 2 * K)](
        qkv, positions, cos, sin, q, keys, values, *keys.stride()[:3], N // B,
        n_heads, K, hd, triton.next_power_of_2(hd // 2), num_warps=1,
    )  # fmt: skip
    return q


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of (N, 2F), the gates first: (N, F)."""
    N, F2 = gate_up.shape
    out = torch.empty(N, F2 // 2, dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul[(N, triton.cdiv(F2 // 2, BLOCK))](gate_up, out, F2 // 2, BLOCK, num_warps=4)
    return out


def row_stats(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Argmax int64 (B,), the first of ties, and log Σ exp (B,) of rows of float32 logits (B, V).

    PyTorch's own kernels reduce a row of 128,256 on a single multiprocessor.
    """
    B, V = logits.shape
    n = triton.cdiv(V, BLOCK)
    places = logits.new_empty(B, n, dtype=torch.int32)
    # Not two views of one tensor: for an odd B the second would be aligned otherwise, and Triton compile again.
    tops, sums = logits.new_empty(B, n), logits.new_empty(B, n)
    _part_stats[(B, n)](logits.contiguous(), places, tops, sums, V, n, BLOCK, num_warps=4)
    ids, normalizers = logits.new_empty(B, dtype=torch.int64), logits.new_empty(B)
    _whole_stats[(B,)](places, tops, sums, ids, normalizers, n, triton.next_power_of_2(n), num_warps=4)
    return ids, normalizers


@triton.jit
def _part_stats(logits, places, tops, sums, V, n, BLOCK: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * V + place, mask=place < V, other=float("-inf"))
    top = tl.max(x, 0)
    tl.store(places + row * n + part, tl.min(tl.where(x == top, place, V), 0))
    tl.store(tops + row * n + part, top)
    tl.store(sums + row * n + part, tl.sum(tl.where(x == float("-inf"), 0.0, tl.exp(x - top)), 0))


@triton.jit
def _whole_stats(places, tops, sums, ids, normalizers, n, PARTS: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    x = tl.load(tops + row * n + part, mask=part < n, other=float("-inf"))
    top = tl.max(x, 0)
    place = tl.load(places + row * n + part, mask=(part < n) & (x == top), other=2147483647)
    tl.store(ids + row, tl.min(place, 0).to(tl.int64))
    total = tl.load(sums + row * n + part, mask=part < n, other=0.0)
    shrunk = tl.where(x == float("-inf"), 0.0, total * tl.exp(x - top))
    tl.store(normalizers + row, tl.log(tl.sum(shrunk, 0)) + top)


@triton.jit
def _rms_norm(x, weight, out, eps, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    x16 = tl.load(x + row * D + column, mask=inside, other=0.0)
    x32 = x16.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x32 * x32, 0) / D + eps)
    normed = (x32 * scale).to(x16.dtype).to(tl.float32)  # rounded as in model.py
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + column, normed * w, mask=inside)


@triton.jit(do_not_specialize=["T"])
def _rotate_and_store(
    qkv, positions, cos, sin, q, keys, values, stride_b, stride_k, stride_s, T,
    H: tl.constexpr, K: tl.constexpr, HD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    pair = tl.arange(0, BLOCK)
    inside = pair < HD // 2
    place = tl.load(positions + n)
    source = qkv + (n * (H + 2 * K) + head) * HD + 2 * pair
    even16, odd16 = tl.load(source, mask=inside), tl.load(source + 1, mask=inside)
    if head < H + K:
        even, odd = even16.to(tl.float32), odd16.to(tl.float32)
        c = tl.load(cos + place * (HD // 2) + pair, mask=inside)
        s = tl.load(sin + place * (HD // 2) + pair, mask=inside)
        even16, odd16 = (even * c - odd * s).to(even16.dtype), (even * s + odd * c).to(odd16.dtype)
    # Offset in the cache, without the head's.
    cell = (n // T) * stride_b + place * stride_s + 2 * pair
    if head < H:
        target = q + (n * H + head) * HD + 2 * pair
    elif head < H + K:
        target = keys + cell + (head - H) * stride_k
    else:
        target = values + cell + (head - H - K) * stride_k
    tl.store(target, even16, mask=inside)
    tl.store(target + 1, odd16, mask=inside)


@triton.jit
def _silu_mul(gate_up, out, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(gate_up + row * 2 * F + column, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * F + F + column, mask=inside, other=0.0)
    g = gate.to(tl.float32)
    silu = (g / (1 + tl.exp(-g))).to(gate.dtype).to(tl.float32)  # rounded as in model.py
    tl.store(out + row * F + column, silu * up.to(tl.float32), mask=inside)
