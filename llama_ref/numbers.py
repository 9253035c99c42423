"""Convert NumPy's and PyTorch's numbers, arrays and tensors to plain Python values."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any, TypeGuard


def plain_number(value: Any) -> Any:
    """A NumPy number or 0-d array or tensor as a Python number; other values unchanged."""
    has_no_dimension = getattr(value, "shape", None) == ()
    return value.item() if has_no_dimension and hasattr(value, "item") else value


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number, Python's or NumPy's, and no bool; int() makes it Python's."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def plain_list(value: Any) -> Any:
    """An array or tensor as nested lists, a list with Python numbers; other values unchanged."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [plain_number(each) for each in value] if isinstance(value, list | tuple) else value


def plain_mapping(value: Any) -> Any:
    """A mapping with keys and values as Python numbers; other values unchanged."""
    if not isinstance(value, Mapping):
        return value
    return {plain_number(key): plain_number(each) for key, each in value.items()}
