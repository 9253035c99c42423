"""What a layer does between its products, each as one kernel (Triton): normalising, rotating and storing, gating.

Every function has a plain form, which is model.py's lines and runs where Triton is not; the kernels round where those round.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ref.device import has_triton
from llama_ref.model import rotate

if has_triton():
    import triton
    import triton.language as tl


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x (N, D)."""
    if not _has_triton(x):
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight
    out = torch.empty_like(x)
    N, D = x.shape
    _rms_norm[(N,)](x, weight, out, eps, D, triton.next_power_of_2(D), num_warps=8)
    return out


def rotate_and_store(
    qkv: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, n_heads: int
) -> Tensor:
    """Rotate the queries and keys in qkv (N, (H + 2K) · hd), store keys and values, return the queries (N, H, hd).

    N tokens are T of each of B rows, at int64 `positions` (N,); cos and sin float32 (S, hd/2) have every position's angles.
    keys and values (B, K, S, hd) are one layer's of a cache, with any strides but hd's.
    """
    B, K, _, hd = keys.shape
    N = len(qkv)
    T = N // B
    if not _has_triton(qkv):
        q, k, v = qkv.unflatten(1, (-1, hd)).split((n_heads, K, K), dim=1)  # (N, heads, hd)
        turn = cos[positions][None, :, None], sin[positions][None, :, None]
        q, k = (rotate(x[None], *turn)[0] for x in (q, k))
        rows = torch.arange(B, device=qkv.device).repeat_interleave(T)
        keys.transpose(1, 2).index_put_((rows, positions), k)
        values.transpose(1, 2).index_put_((rows, positions), v)
        return q
    q = torch.empty(N, n_heads, hd, dtype=qkv.dtype, device=qkv.device)
    heads = n_heads + 2 * K
    _rotate_and_store[(N, heads)](
        qkv, positions, cos, sin, q, keys, values, *keys.stride()[:3], T,
        n_heads, K, hd, triton.next_power_of_2(hd // 2), num_warps=1,
    )  # fmt: skip
    return q


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of (N, 2F), the gates first: (N, F)."""
    N, F2 = gate_up.shape
    if not _has_triton(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    out = torch.empty(N, F2 // 2, dtype=gate_up.dtype, device=gate_up.device)
    block = 1024
    _silu_mul[(N, triton.cdiv(F2 // 2, block))](gate_up, out, F2 // 2, block, num_warps=4)
    return out


def _has_triton(x: Tensor) -> bool:
    return x.is_cuda and has_triton()


def likeliest(logits: Tensor) -> Tensor:
    """Ids (B,) of the largest logits (B, V), the first of several."""
    return _row_stats(logits)[0] if _has_triton(logits) else logits.argmax(-1)


def log_normalizer(logits: Tensor) -> Tensor:
    """log Σ exp(logits) of float32 (B, V): (B,)."""
    return _row_stats(logits)[1] if _has_triton(logits) else logits.logsumexp(-1)


def _row_stats(logits: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's own kernels go over a row of 128,256 with one of the card's many processors."""
    B, V = logits.shape
    block = 1024
    n = triton.cdiv(V, block)
    like = {"device": logits.device}
    places = torch.empty(B, n, dtype=torch.int32, **like)
    tops, sums = torch.empty(2, B, n, dtype=torch.float32, **like)
    _part_stats[(B, n)](logits.contiguous(), places, tops, sums, V, n, block, num_warps=4)
    ids = torch.empty(B, dtype=torch.int64, **like)
    normalizers = torch.empty(B, dtype=torch.float32, **like)
    _whole_stats[(B,)](places, tops, sums, ids, normalizers, n, triton.next_power_of_2(n), num_warps=4)
    return ids, normalizers


if has_triton():

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
        normed = (x32 * scale).to(x16.dtype).to(tl.float32)  # rounded as the model's
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * D + column, normed * w, mask=inside)

    @triton.jit
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
        cell = (n // T) * stride_b + place * stride_s + 2 * pair  # of the cache, but for its head
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
        silu = (g / (1 + tl.exp(-g))).to(gate.dtype).to(tl.float32)  # rounded as the model's
        tl.store(out + row * F + column, silu * up.to(tl.float32), mask=inside)
