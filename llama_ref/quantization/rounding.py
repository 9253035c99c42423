"""Quantize weights to integers and scales, and back: round to nearest, with least-squares scales.

    int8:  w ≈ q · scale              q in -127..127, a scale per row
    int4:  w ≈ (q - 8) · scale + zero  q in 0..15, a scale and a zero point per group of a row's weights

Scales are rounded to bfloat16 before the weights are quantized, so kernels that take bfloat16
scales are exact. A few rows are processed at a time to limit memory; each row's result depends on
that row alone.
"""

import torch
from torch import Tensor

from llama_ref.machine import memory

# Weights processed at a time. On a CPU, float32 copies of a block stay in a core's cache. A GPU needs
# large blocks, because each costs up to 90 kernel launches. int4 takes 18 bytes of temporary memory per
# weight of a block (22 with `importance`): 0.3 GB on CUDA.
BLOCK_WEIGHTS = {"cpu": 1 << 18, "cuda": 1 << 24}
TINIEST = 1e-30  # replaces a scale of zero
LEAST_IMPORTANCE = 1e-4  # lower bound of a column's importance, relative to the average
LEAST_SQUARE = 0.5  # lower bound of the squared deviation of steps (unweighted: nearly 1 or more if they differ)
FINEST = 2**-12  # smallest scale, as a fraction of the group's largest weight

# Fractions of a group's range tried for its sixteen steps: a shorter range clips a few outer weights.
SPANS = (1.0, 0.93, 0.86, 0.8)
REFITS = 2  # iterations: steps from scales, scales from steps


def int8_scales(weight: Tensor) -> Tensor:
    """Scales of a matrix (N, K): float32 (N,), exact in bfloat16."""
    largest = torch.cat([rows.abs().amax(1).float() for rows in _blocks(weight)])
    return _bf16(largest / 127).float().clamp(min=TINIEST)


def to_int8(weight: Tensor, scale: Tensor) -> Tensor:
    """Quantize a matrix (N, K) with its scales: int8 (N, K)."""
    out = memory.empty(*weight.shape, dtype=torch.int8, device=weight.device)
    for rows, scales, target in zip(_blocks(weight), _blocks(scale, weight.shape[1]), _blocks(out), strict=True):
        target.copy_((rows.float() / scales[:, None]).round_().clamp_(-127, 127))
    return out


def int4_scales(weight: Tensor, group: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scales and zero points of a matrix (N, K): bfloat16 (N, K/group) each.

    `importance` (K,) weights the errors of each column; None: all columns count the same.
    """
    shares = None
    if importance is not None:
        groups = importance.clamp(min=importance.mean() * LEAST_IMPORTANCE + TINIEST).unflatten(0, (-1, group))
        shares = groups / groups.mean(-1, keepdim=True)  # (K/G, G), on average 1 in every group
    found = [_fit(rows.float().unflatten(1, (-1, group)), shares) for rows in _blocks(weight)]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


def to_int4(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Quantize a matrix (N, K) with its scales: uint8 (N, K/2), packed by `pack`."""
    (N, K), n_groups = weight.shape, scale.shape[1]
    out = memory.empty(N, K // 2, dtype=torch.uint8, device=weight.device)
    blocks = zip(_blocks(weight), _blocks(scale, K), _blocks(zero, K), _blocks(out, K), strict=True)
    for rows, scales, zeros, target in blocks:
        groups = rows.float().unflatten(1, (n_groups, -1))  # (n, K/G, G)
        target.copy_(pack((steps(groups, scales.unsqueeze(-1).float(), zeros.unsqueeze(-1).float()) + 8).to(torch.uint8)))
    return out


def pack(q: Tensor) -> Tensor:
    """Pack uint8 0..15 (N, K/G, G) into bytes (N, K/2), a group's first half in the low nibbles."""
    low, high = q.chunk(2, dim=-1)
    return (low | high << 4).flatten(1)


def unpack(packed: Tensor, n_groups: int) -> Tensor:
    """Inverse of `pack`: bytes (N, K/2) -> uint8 (N, K/G, G)."""
    groups = packed.unflatten(1, (n_groups, -1))
    return torch.cat((groups & 15, groups >> 4), dim=-1)


def _fit(groups: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor]:
    """Refitted scales and zero points: (n, K/G, G) -> 2 × bfloat16 (n, K/G).

    For given steps, least squares gives the best scale and zero point and the remaining error, so
    the steps of every range are computed once, and errors need not be summed.
    """
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)  # (n, K/G, 1)
    mean = _mean(groups, shares)
    centred = groups - mean
    # Steps finer than the precision of a bfloat16 zero point are useless. Also covers groups of one value.
    finest = (torch.maximum(high, -low) * FINEST).clamp_(min=TINIEST)
    explained = scale = offset = torch.zeros_like(mean)
    for span in SPANS:
        step = torch.maximum((high - low) * (span / 15), finest)
        zero = (high + low + step) / 2  # steps -8..7 lie half a step below the middle
        slope, q_mean, gain = _least_squares(steps(groups, step, zero), centred, shares)
        better = gain >= explained
        explained = torch.where(better, gain, explained)
        scale, offset = torch.where(better, slope, scale), torch.where(better, q_mean, offset)
    for _ in range(REFITS):
        scale = torch.maximum(scale, finest)
        scale, offset, _ = _least_squares(steps(groups, scale, mean - scale * offset), centred, shares)
    scale = torch.maximum(scale, finest).bfloat16()
    return scale.squeeze(-1), (mean - scale.float() * offset).squeeze(-1).bfloat16()


def _least_squares(q: Tensor, centred: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The least-squares scale for given steps, the steps' mean, and the squares they explain."""
    weighted = q if shares is None else q * shares
    q_mean = weighted.mean(-1, keepdim=True)
    product = (weighted * centred).sum(-1, keepdim=True)
    square = (weighted.mul_(q).sum(-1, keepdim=True) - q.shape[-1] * q_mean.square()).clamp_(min=LEAST_SQUARE)
    return product / square, q_mean, product.square() / square


def _mean(groups: Tensor, shares: Tensor | None) -> Tensor:
    return (groups if shares is None else groups * shares).mean(-1, keepdim=True)


def steps(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest of the sixteen steps for each weight, as float32 -8..7."""
    return (groups - zero).div_(scale).round_().clamp_(-8, 7)


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16)


def _blocks(matrix: Tensor, columns: int | None = None) -> tuple[Tensor, ...]:
    """Blocks of rows of a matrix, or of a tensor for the rows of a matrix with `columns`."""
    n_weights = BLOCK_WEIGHTS.get(matrix.device.type, BLOCK_WEIGHTS["cpu"])
    return matrix.split(max(1, n_weights // (columns or matrix.shape[1])))
