"""Check scales for NaN, infinite and negative values."""

from torch import Tensor


def odd(scales: Tensor, *, positive: bool = False) -> str | None:
    """Name a NaN, an infinite or a negative number among scales, else None; with `positive`, zero too."""
    if scales.isnan().any():
        return "a NaN"
    if scales.isinf().any():
        return "an infinite number"
    wrong = scales <= 0 if positive else scales < 0
    return f"{scales.min().item():g}" if wrong.any() else None
