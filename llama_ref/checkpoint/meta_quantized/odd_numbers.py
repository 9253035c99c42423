"""What is wrong with scales."""

from torch import Tensor


def odd(scales: Tensor) -> str | None:
    """The first kind of number that a scale cannot be; None if there is none."""
    if scales.isnan().any():
        return "a NaN"
    if scales.isinf().any():
        return "an infinite number"
    return f"{scales.min().item():g}" if (scales <= 0).any() else None
