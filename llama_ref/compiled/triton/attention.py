"""Attention of one token per row to a KV cache: two Triton kernels (flash-decoding).

In the first, a program attends with the query heads of one key head to a part of its cache; the second
merges the parts. A row's length is read on the device, so one launch, or one CUDA graph, serves all.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_ref.compiled.triton.products import has_pdl, has_tensor_cores

BLOCK_NUMBERS = 8192  # keys at a time × head_dim
FEWER_NUMBERS = 2048  # without Ampere's matrix instructions: 8192 would spill 1.8 kB of registers there
FEWEST_KEYS = 16  # the minimum of tl.dot
MOST_SPLITS = 64
PROGRAMS = 528  # four per multiprocessor of an H100


def attend_one(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one token per row: q (B, H, hd), keys and values (B, K, S, hd) -> (B, H, hd).

    Keys and values have the same strides, that of hd is 1. Row b attends to its first
    `lengths[b]` + 1 keys; `lengths` int64 (B,) counts those before the new token.
    """
    (B, H, hd), K = q.shape, keys.shape[1]
    G = H // K
    splits = max(1, min(MOST_SPLITS, triton.next_power_of_2(PROGRAMS // (B * K))))
    sums = torch.empty(B, H, splits, hd, dtype=torch.float32, device=q.device)
    tops = torch.empty(B, H, splits, 2, dtype=torch.float32, device=q.device)  # largest score, sum of exponentials
    out = torch.empty_like(q)
    pdl = has_pdl(q.device)
    launch = {"launch_pdl": True} if pdl else {}
    block = max(FEWEST_KEYS, (BLOCK_NUMBERS if has_tensor_cores(q.device) else FEWER_NUMBERS) // hd)
    padded = max(16, triton.next_power_of_2(G))  # the fewest rows that a tensor core takes
    scale = math.log2(math.e) / math.sqrt(hd)
    _look[(B * K, splits)](
        q, keys, values, lengths, sums, tops, scale, *keys.stride()[:3], splits,
        K, G, padded, hd, block, pdl,
        num_warps=4, num_stages=3, **launch,
    )  # fmt: skip
    _put_together[(B * H,)](out, sums, tops, lengths, splits, H, hd, block, MOST_SPLITS, pdl, num_warps=4, **launch)
    return out


@triton.jit
def _stretch(n, splits, BLOCK: tl.constexpr):
    """Keys per program: whole blocks."""
    return tl.cdiv(tl.cdiv(n, splits), BLOCK) * BLOCK


@triton.jit(do_not_specialize=["splits"])
def _look(
    q, keys, values, lengths, sums, tops, scale, stride_b, stride_k, stride_s, splits,
    K: tl.constexpr, G: tl.constexpr, PADDED: tl.constexpr, HD: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, kv_head, split = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1)
    n = (tl.load(lengths + row) + 1).to(tl.int32)
    stretch = _stretch(n, splits, BLOCK)
    begin = split * stretch
    if begin < n:
        g, d = tl.arange(0, PADDED), tl.arange(0, HD)
        head = (row * K + kv_head) * G + g
        q_at = tl.load(q + head[:, None] * HD + d, mask=(g < G)[:, None], other=0)
        first = row.to(tl.int64) * stride_b + kv_head * stride_k
        top = tl.full((PADDED,), float("-inf"), tl.float32)
        total = tl.zeros((PADDED,), tl.float32)
        mixed = tl.zeros((PADDED, HD), tl.float32)
        for start in range(begin, min(begin + stretch, n), BLOCK):
            s = start + tl.arange(0, BLOCK)
            inside = s < n
            place = first + s.to(tl.int64) * stride_s
            k = tl.load(keys + place + d[:, None], mask=inside[None, :], other=0)  # (HD, BLOCK)
            scores = tl.dot(q_at, k, input_precision="ieee") * scale
            scores = tl.where(inside, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            p = tl.exp2(scores - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, 1)
            v = tl.load(values + place[:, None] + d, mask=inside[:, None], other=0)  # (BLOCK, HD)
            mixed = tl.dot(p.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
            top = new_top
        cell = head * splits + split
        tl.store(sums + cell[:, None].to(tl.int64) * HD + d, mixed, mask=(g < G)[:, None])
        tl.store(tops + cell * 2, top, mask=g < G)
        tl.store(tops + cell * 2 + 1, total, mask=g < G)


@triton.jit(do_not_specialize=["splits"])
def _put_together(
    out, sums, tops, lengths, splits,
    H: tl.constexpr, HD: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    n = (tl.load(lengths + head // H) + 1).to(tl.int32)
    stretch = _stretch(n, splits, BLOCK)
    split, d = tl.arange(0, MOST), tl.arange(0, HD)
    inside = split * stretch < n  # never more than `splits`
    cell = head * splits + split
    top = tl.load(tops + cell * 2, mask=inside, other=float("-inf"))
    total = tl.load(tops + cell * 2 + 1, mask=inside, other=0)
    mixed = tl.load(sums + cell[:, None].to(tl.int64) * HD + d, mask=inside[:, None], other=0)
    weight = tl.exp2(top - tl.max(top, 0))
    y = tl.sum(mixed * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + head * HD + d, y)
