"""Four bits by what a layer is given: columns are rounded one by one, each making up for the errors before it.

With H = XᵀX of a layer's inputs X, errors E (N, K) of its weights change the outputs by |E Xᵀ|² = |E L|², where H = L Lᵀ. As L
is lower triangular, column j of E L holds the errors of the columns from j on and no others: from the last column to the first,
each weight is moved by what makes its column zero, and then rounded. That is GPTQ (arXiv:2210.17323) without an inverse of H.
"""

import torch
from torch import Tensor

from llama_ref.quantization.rounding import int4_scales, pack, steps

# Of every column's square, added to it: what columns have in common on a few thousand tokens is chance in part, and without
# this much errors on other texts were half as large again.
DAMPING = 0.3
MORE_DAMPING = 10.0  # times as much where that does not do
LEAST_SQUARE = 1e-6  # of a column, where the average is 1: none is free
TINIEST = 1e-30


def round_int4(weight: Tensor, hessian: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix (N, K) and XᵀX (K, K) of its inputs -> an Int4Linear's packed (N, K/2), scale and zero (N, K/group).

    Groups are rounded by falling importance, so that errors are left to columns that count little, and within them likewise.
    Takes three more matrices like `hessian` (0.8 GB each for the 14,336 inputs of an 8B's w2), which has to be finite.
    """
    N, K = weight.shape
    order = _rising(hessian.diagonal(), group)  # (K,)
    root = _root(hessian, order)  # (K, K), lower
    wanted = weight.float().T[order]  # (K, N)
    errors = torch.empty_like(wanted)
    q = torch.empty(K, N, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(N, K // group, dtype=torch.bfloat16, device=weight.device)
    zero = torch.empty_like(scale)
    for start in range(K - group, -1, -group):
        here, done = slice(start, start + group), slice(start + group, K)
        triangle = root[here, here]
        carried = root[done, here].T @ errors[done]  # (G, N): what is to be made up for
        ideal = wanted[here] + torch.linalg.solve_triangular(triangle.T, carried, upper=True)  # of weights in no steps
        own = int(order[start]) // group
        found = int4_scales(ideal.T.contiguous(), group, triangle.diagonal().square())
        scale[:, own], zero[:, own] = (each.squeeze(1) for each in found)
        q[here] = _round_group(wanted[here], errors[here], carried, triangle, scale[:, own].float(), zero[:, own].float())
    in_place = torch.empty_like(q)
    in_place[order] = q
    return pack(in_place.T.contiguous().unflatten(1, (-1, group))), scale, zero


def _round_group(wanted: Tensor, errors: Tensor, carried: Tensor, triangle: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Some columns' numbers uint8 (G, N), from the last to the first; fills in their `errors`."""
    q = torch.empty(wanted.shape, dtype=torch.uint8, device=wanted.device)
    shares = triangle / triangle.diagonal()
    carried = carried / triangle.diagonal()[:, None]
    for j in range(len(wanted) - 1, -1, -1):
        moved = wanted[j] + carried[j] + shares[j + 1 :, j] @ errors[j + 1 :]
        rounded = steps(moved, scale, zero)  # (N,)
        q[j] = rounded + 8
        errors[j] = wanted[j] - (rounded * scale + zero)
    return q


def _rising(squares: Tensor, group: int) -> Tensor:
    """Columns in the order of rising squares: groups by their mean, and each group's own columns, which stay together."""
    groups = squares.unflatten(0, (-1, group))
    inside = groups.argsort(1) + group * torch.arange(len(groups), device=squares.device)[:, None]
    return inside[groups.mean(1).argsort()].flatten()


def _root(hessian: Tensor, order: Tensor) -> Tensor:
    """L lower triangular with L Lᵀ the damped hessian, its columns in `order`.

    Every column is brought to a square of 1 before, so that one of huge inputs, as the first token's are, damps no other.
    """
    squares = hessian.diagonal()[order]
    length = squares.clamp(min=squares.mean() * LEAST_SQUARE + TINIEST).sqrt()
    alike = hessian[order][:, order].div_(length).div_(length[:, None])
    damping = DAMPING
    while True:
        alike.diagonal().fill_(1 + damping)
        root, failed = torch.linalg.cholesky_ex(alike)
        if not failed:
            return root.mul_(length[:, None])
        damping *= MORE_DAMPING
