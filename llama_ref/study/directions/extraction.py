"""Directions in the residual stream, from the activations of one or two kinds of texts.

    x = study.Collected("folder").select("layers.12.residual_post", positions=-1)  # (prompts, D)
    study.mean_difference(x[happy], x[sad])  # (D,)

steering.py adds and removes them, probes.py fits one to labels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.numbers import is_whole


@dataclass(frozen=True)
class Components:
    """Principal components: `directions` (k, D) of length 1, and the `share` (k,) of variance of each."""

    directions: Tensor
    share: Tensor


def mean_difference(of: Tensor, over: Tensor) -> Tensor:
    """The mean of activations (n, D) minus the mean of others (m, D): float32 (D,), on the CPU.

    Raises RequestError for other shapes, or values that are not finite.
    """
    of, over = check_rows("of", of), check_rows("over", over)
    if of.shape[1] != over.shape[1]:
        raise RequestError(f"of has {of.shape[1]} dimensions and over {over.shape[1]}: take both from one activation")
    return of.mean(0) - over.mean(0)


def principal_components(rows: Tensor, n: int = 1) -> Components:
    """The n directions in which activations (rows, D) vary most, after their mean is removed.

    The sign of a direction has no meaning. Raises RequestError for other shapes, or an n that is
    larger than the number of components.
    """
    rows = check_rows("rows", rows)
    most = min(len(rows) - 1, rows.shape[1])
    if not is_whole(n) or not 1 <= n <= most:
        raise RequestError(f"n is {n!r:.40}, expected 1 to {most} for {len(rows)} rows of {rows.shape[1]} numbers")
    _, values, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    variance = values.square()
    return Components(directions[:n], variance[:n] / variance.sum())


def check_rows(what: str, rows: Tensor) -> Tensor:
    """Activations (n, D) as float32 on the CPU. Raises RequestError."""
    if not isinstance(rows, Tensor) or rows.dim() != 2 or not rows.numel() or not rows.is_floating_point():
        raise RequestError(f"{what} is {_shown(rows)}, expected activations (n, D), such as Collected.select gives")
    if not rows.isfinite().all():
        raise RequestError(f"{what} has values that are not finite")
    return rows.detach().to("cpu", torch.float32)


def check_direction(direction: Tensor, dim: int) -> Tensor:
    """A direction (D,) as float32. Raises RequestError unless it is finite and not zero."""
    if not isinstance(direction, Tensor) or direction.shape != (dim,) or not direction.is_floating_point():
        found = (
            f"a tensor {tuple(direction.shape)} of {direction.dtype}" if isinstance(direction, Tensor) else f"{direction!r:.60}"
        )
        raise RequestError(f"direction is {found}, expected floating-point numbers ({dim},)")
    if not direction.isfinite().all() or not direction.any():
        raise RequestError("direction is zero or has values that are not finite")
    return direction.detach().float()


def _shown(given: object) -> str:
    return f"a tensor {tuple(given.shape)} of {given.dtype}" if isinstance(given, Tensor) else f"{given!r:.60}"
