"""A tensor on its way to a file: known by shape before its values exist, and made block by block when its turn comes."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BLOCK_BYTES = 16 << 20  # large enough that calls cost nothing, small enough that memory stays flat

BytesWritten = Callable[[int], object]  # called with the bytes of each block once they are written


class Sink(Protocol):
    def write(self, data: memoryview, /) -> object: ...


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written. `blocks` gives whole rows in order, together all of it, and is called when its turn comes.

    A block may lie anywhere and in any strides; only one is held at a time.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterable[Tensor]]

    @classmethod
    def from_tensor(cls, name: str, tensor: Tensor) -> "LazyTensor":
        """Wrap a tensor that exists already, in memory or mapped."""
        return cls(name, tuple(tensor.shape), tensor.dtype, lambda: row_blocks(tensor))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def write_to(self, sink: Sink, progress: BytesWritten | None = None) -> None:
        """Write the bytes row by row. Raises ValueError where the blocks are not what shape and dtype promise."""
        n_rows = 0
        for block in self.blocks():
            self._check(block, n_rows)
            n_rows += len(block)
            sink.write(_bytes_of(block))
            if progress:
                progress(block.nbytes)
            del block  # before the next one is made
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
    """Views of a tensor's rows, as many at a time as `n_bytes` hold (one at least)."""
    row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    yield from tensor.split(max(1, n_bytes // max(1, row_bytes)))


def check_writable(tensors: Sequence[LazyTensor]) -> None:
    """Raise ValueError for tensors that no weight file can hold: two of one name, or one without dimensions."""
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(f"two tensors are named {tensor.name}")
        if not tensor.shape:
            raise ValueError(f"{tensor.name} has no dimensions, expected rows")
        seen.add(tensor.name)


def _bytes_of(block: Tensor) -> memoryview:
    row_by_row = block.detach().cpu().contiguous()  # copied only where it is not so already
    return row_by_row.view(-1).view(torch.uint8).numpy().data
