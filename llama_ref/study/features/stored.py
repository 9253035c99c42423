"""The tensors of a dictionary's file, by name, with checks of their shapes; and checked values of its config."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_ref.checkpoint.formats.safetensors import map_safetensors
from llama_ref.checkpoint.reader import read_shard
from llama_ref.errors import CheckpointError, UnsupportedModel
from llama_ref.files import BadValue

CONFIG_LIMIT_BYTES = 1 << 20
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Stored:
    """A file's tensors, memory-mapped. Raises CheckpointError for a file of another format, or a damaged one."""

    def __init__(self, path: Path):
        self.path = path
        self.tensors = map_safetensors(path) if path.suffix == ".safetensors" else read_shard(path)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def matrix(self, name: str, n_axes: int = 2) -> Tensor:
        """A tensor with `n_axes` axes, none of them empty. Raises CheckpointError."""
        found = self._tensor(name)
        if found.dim() != n_axes or not found.numel():
            raise CheckpointError(f"{self.path}: {name} is {tuple(found.shape)}, expected a tensor of {n_axes} axes")
        return found

    def shaped(self, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor of this shape. Raises CheckpointError."""
        found = self._tensor(name)
        if tuple(found.shape) != tuple(shape):
            raise CheckpointError(
                f"{self.path}: {name} is {tuple(found.shape)}, expected {tuple(shape)} to match its other tensors"
            )
        return found

    def vector(self, name: str, size: int) -> Tensor:
        """A small tensor (size,), checked to be finite."""
        return self.finite(name, self.shaped(name, (size,)))

    def scalar(self, name: str) -> Tensor:
        """A tensor of one number, of any shape and dtype, as float32 ()."""
        found = self.tensors.get(name)
        if found is None or found.numel() != 1:
            raise CheckpointError(f"{self.path}: {name} is missing, or is not one number")
        return self.finite(name, found.reshape(()).float())

    def finite(self, name: str, values: Tensor) -> Tensor:
        if not values.isfinite().all():
            raise CheckpointError(f"{self.path}: {name} has values that are not finite; fetch it again")
        return values

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} lacks {name}; it has {', '.join(sorted(self.tensors)[:8])}")
        found = self.tensors[name]
        if found.dtype not in DTYPES:
            raise CheckpointError(f"{self.path}: {name} is of {found.dtype}, expected floating-point numbers")
        return found


# ---- values of a config


def number(config: Mapping[str, Any], key: str) -> float:
    """A positive number from a config. Raises BadValue."""
    found = config.get(key)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < float("inf"):
        raise BadValue(f"{key} is {found!r:.40}, expected a positive number")
    return float(found)


def count(config: Mapping[str, Any], key: str) -> int:
    """A positive whole number from a config. Raises BadValue."""
    found = config.get(key)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise BadValue(f"{key} is {found!r:.40}, expected a positive whole number")
    return found


def word(config: Mapping[str, Any], key: str, default: str | None = None) -> str:
    """A string from a config. Raises BadValue."""
    found = config.get(key, default)
    if not isinstance(found, str):
        raise BadValue(f"{key} is {found!r:.40}, expected a text")
    return found


def switch(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """A boolean from a config. Raises BadValue."""
    found = config.get(key, default)
    if not isinstance(found, bool):
        raise BadValue(f"{key} is {found!r:.40}, expected true or false")
    return found


def check_k(k: int, n_features: int) -> int:
    """Return k. Raises BadValue if it is above the number of features."""
    if k > n_features:
        raise BadValue(f"k is {k}, but there are {n_features} features")
    return k


def refuse(what: str) -> UnsupportedModel:
    """The error for an unsupported kind of dictionary."""
    return UnsupportedModel(f"{what}, which is not supported")
