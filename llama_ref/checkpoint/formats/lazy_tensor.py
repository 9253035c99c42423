"""Tensors to be written to a file, whose values are produced block by block when needed."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BLOCK_BYTES = 16 << 20  # large enough to hide the cost of a call, small enough to keep memory flat

BytesWritten = Callable[[int], object]  # called after each block with its number of bytes


class Sink(Protocol):
    def write(self, data: memoryview, /) -> object: ...


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written: name, shape and dtype now, values from `blocks()` when it is written.

    The blocks are consecutive rows that together make up the tensor. They may be on any device and
    have any strides. Only one is held in memory at a time.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterable[Tensor]]

    @classmethod
    def from_tensor(cls, name: str, tensor: Tensor) -> "LazyTensor":
        """Wrap an existing tensor, in memory or memory-mapped."""
        return cls(name, tuple(tensor.shape), tensor.dtype, lambda: row_blocks(tensor))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def write_to(self, sink: Sink, progress: BytesWritten | None = None) -> None:
        """Write the bytes row by row. Raises ValueError if blocks do not match shape and dtype."""
        n_rows = 0
        for block in self.blocks():
            self._check(block, n_rows)
            n_rows += len(block)
            sink.write(bytes_of(block))
            if progress:
                progress(block.nbytes)
            del block  # free it before the next one is produced
        if n_rows != self.shape[0]:
            raise ValueError(f"the blocks of {self.name} have {n_rows:,} rows, expected {self.shape[0]:,}")

    def _check(self, block: Tensor, n_before: int) -> None:
        if block.dtype != self.dtype or block.dim() != len(self.shape) or block.shape[1:] != self.shape[1:]:
            raise ValueError(
                f"a block of {self.name} is {block.dtype} of shape {tuple(block.shape)}, expected {self.dtype} rows of "
                f"{self.shape}"
            )
        if n_before + len(block) > self.shape[0]:
            raise ValueError(f"the blocks of {self.name} have more than the {self.shape[0]:,} rows of its shape")


def row_blocks(tensor: Tensor, n_bytes: int = BLOCK_BYTES) -> Iterator[Tensor]:
    """Views of consecutive rows, each of at most `n_bytes` but at least one row."""
    row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    yield from tensor.split(max(1, n_bytes // max(1, row_bytes)))


def check_writable(tensors: Sequence[LazyTensor]) -> None:
    """Raise ValueError for duplicate names and for tensors without dimensions."""
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(f"two tensors are named {tensor.name}")
        if not tensor.shape:
            raise ValueError(f"{tensor.name} has no dimensions, expected rows")
        seen.add(tensor.name)


def bytes_of(block: Tensor) -> memoryview:
    """A tensor's bytes, row by row."""
    row_by_row = block.detach().cpu().contiguous()  # copies only if necessary
    return row_by_row.view(-1).view(torch.uint8).numpy().data
