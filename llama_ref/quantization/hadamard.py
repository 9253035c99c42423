"""SpinQuant's Hadamard rotation (arXiv:2405.16406), which spreads outliers over a vector."""

from functools import cache

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]


def hadamard(x: Tensor, factors: Factors | None = None) -> Tensor:
    """x (…, n) times Sylvester's Hadamard matrix over √n: float32 (…, n).

    The matrix is symmetric and its own inverse. `factors`: the result of `hadamard_factors`,
    computed if None. Raises ValueError unless n is a power of two.
    """
    n = x.shape[-1]
    left, right = factors or hadamard_factors(n, x.device)
    grid = x.float().unflatten(-1, (len(left), len(right)))
    return (left @ grid @ right).flatten(-2) * n**-0.5


@cache
def hadamard_factors(n: int, device: torch.device) -> Factors:
    """Two matrices of ±1 whose Kronecker product is Sylvester's of size n: float32, about √n wide.

    Two products with them replace one with a matrix of n² numbers.
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"{n} is not a power of two")
    rows = 1 << n.bit_length() // 2
    return _signs(rows, device), _signs(n // rows, device)


def _signs(n: int, device: torch.device) -> Tensor:
    """Sylvester's matrix of ±1: float32 (n, n)."""
    out, half = torch.ones(1, 1, device=device), torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=device)
    while len(out) < n:
        out = torch.kron(half, out)
    return out
