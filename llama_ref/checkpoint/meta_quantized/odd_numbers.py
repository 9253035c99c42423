"""What is wrong with scales."""

from torch import Tensor


def odd(scales: Tensor, *, positive: bool = False) -> str | None:
    """The first kind of number that no scale can be; None if there is none. `positive`: nor zero."""
    if scales.isnan().any():
        return "a NaN"
    if scales.isinf().any():
        return "an infinite number"
    wrong = scales <= 0 if positive else scales < 0
    return f"{scales.min().item():g}" if wrong.any() else None
