"""GPTQ (arXiv:2210.17323): round columns one by one, each compensating earlier errors.

With H = XᵀX of a layer's inputs X, weight errors E (N, K) change the outputs by |E Xᵀ|² = |E L|²,
where H = L Lᵀ. L is lower triangular, so column j of E L depends on the errors of columns j and
later only: from the last column to the first, each weight is shifted to make its column zero, and
then rounded. This needs no inverse of H.
"""

import torch
from torch import Tensor

from llama_ref.quantization.rounding import int4_scales, pack, steps

# Added to each diagonal entry, as a fraction of it. Correlations over a few thousand tokens are partly
# chance: without damping, errors on other texts were 50% larger.
DAMPING = 0.3
MORE_DAMPING = 10.0  # factor, applied until the matrix is positive definite
LEAST_SQUARE = 1e-6  # lower bound of a column's square, relative to the average
TINIEST = 1e-30


def round_int4(weight: Tensor, hessian: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round a matrix (N, K), given XᵀX (K, K): packed (N, K/2), scale and zero (N, K/group).

    Groups, and columns within a group, are rounded in order of decreasing importance, so that
    unimportant columns absorb the errors. Needs memory for three more matrices like `hessian` (0.8
    GB each for the 14,336 inputs of an 8B's w2), which must be finite.
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
        carried = root[done, here].T @ errors[done]  # (G, N): errors to compensate
        ideal = wanted[here] + torch.linalg.solve_triangular(triangle.T, carried, upper=True)  # before rounding
        own = int(order[start]) // group
        found = int4_scales(ideal.T.contiguous(), group, triangle.diagonal().square())
        scale[:, own], zero[:, own] = (each.squeeze(1) for each in found)
        q[here] = _round_group(wanted[here], errors[here], carried, triangle, scale[:, own].float(), zero[:, own].float())
    in_place = torch.empty_like(q)
    in_place[order] = q
    return pack(in_place.T.contiguous().unflatten(1, (-1, group))), scale, zero


def _round_group(wanted: Tensor, errors: Tensor, carried: Tensor, triangle: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Round a group's columns, last to first: uint8 (G, N). Writes their `errors` in place."""
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
    """Column order by increasing square: first groups by mean, then columns within groups."""
    groups = squares.unflatten(0, (-1, group))
    inside = groups.argsort(1) + group * torch.arange(len(groups), device=squares.device)[:, None]
    return inside[groups.mean(1).argsort()].flatten()


def _root(hessian: Tensor, order: Tensor) -> Tensor:
    """Lower triangular L with L Lᵀ = the damped hessian, its columns in `order`.

    Columns are normalized to a square of 1 first, so that huge inputs (the first token's) do not
    determine the damping of the others.
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
