"""Copy tensors from mapped files to a GPU through two buffers of pinned memory.

The driver copies pageable memory through a small buffer of its own: page faults, host copy and
transfer take turns on one thread. Here all threads fill one pinned buffer while the GPU fetches the
other. Bytes travel in the file's dtype; casts run on the GPU.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

BUFFER_BYTES = 32 << 20
N_BUFFERS = 2


class Event(Protocol):
    """A mark in the device's queue after a copy; torch.cuda.Event is one."""

    def synchronize(self) -> None: ...


Submit = Callable[[Callable[[], None]], Event]


class PinnedCopier:
    """Copies tensors to a device through reused host buffers.

    `buffers` are uint8 tensors of one size. `submit(copy)` queues `copy` on the device and returns
    an event that marks its end; copies run in the order of submission.
    """

    def __init__(self, buffers: list[Tensor], submit: Submit):
        self.buffers = buffers
        self.submit = submit
        self.events: list[Event | None] = [None] * len(buffers)
        self.turn = 0
        self.scratch: Tensor | None = None  # on the device

    def copy(
        self,
        source: Tensor,
        target: Tensor,
        release: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Copy `source`, on the host, to `target`, on the device: equal shapes, any dtypes.

        The device may still be copying on return, but `source` has been read completely.
        `release(part)` is called for each part of `source` as soon as it has been read.
        """
        for part, place in _parts(source, target, self.buffers[0].nbytes):
            staged = _view(self._free_buffer(), part)
            staged.copy_(part)
            if release:
                release(part)
            self.events[self.turn] = self.submit(partial(self._send, staged, place))
            self.turn = (self.turn + 1) % len(self.buffers)

    def close(self) -> None:
        """Wait until the device has finished all copies, and drop the buffers."""
        for event in self.events:
            if event:
                event.synchronize()
        self.buffers, self.events, self.scratch = [], [], None

    def _free_buffer(self) -> Tensor:
        if event := self.events[self.turn]:
            event.synchronize()
        return self.buffers[self.turn]

    def _send(self, staged: Tensor, place: Tensor) -> None:
        if place.dtype == staged.dtype and place.is_contiguous():
            place.copy_(staged, non_blocking=True)
            return
        # torch would cast on the host, or into new memory for each part.
        if self.scratch is None:
            n_bytes = self.buffers[0].nbytes
            self.scratch = torch.empty(n_bytes, dtype=torch.uint8, device=place.device)
        scratch = _view(self.scratch, staged)
        scratch.copy_(staged, non_blocking=True)
        place.copy_(scratch)


@dataclass(frozen=True)
class Target:
    """The destination of loaded tensors.

    `copier` copies to a CUDA `device` and releases the files' pages. `in_memory`: copy even pages
    that a CPU could use directly.
    """

    device: torch.device | str
    copier: PinnedCopier | None = None
    in_memory: bool = False


@contextlib.contextmanager
def pinned_copier(device: torch.device | str) -> Iterator[PinnedCopier | None]:
    """A copier to a CUDA device, for the duration of a load.

    None for other devices and without pinned memory: use `Tensor.copy_` then. On exit all copies
    are complete and the pinned memory is returned to the system.
    """
    to = torch.device(device)
    copier = _pinned_copier(to) if to.type == "cuda" else None
    yield copier
    if copier:
        copier.close()
        # Private, and missing in old releases. Without it torch keeps the memory for later copies.
        getattr(torch._C, "_host_emptyCache", lambda: None)()


def _pinned_copier(device: torch.device) -> PinnedCopier | None:
    if not torch.cuda.is_available():
        return None
    try:
        buffers = [_pinned_buffer() for _ in range(N_BUFFERS)]
    except RuntimeError:  # such as a limit on locked memory
        return None
    return PinnedCopier(buffers, partial(_run, device))


def _pinned_buffer() -> Tensor:
    return torch.empty(BUFFER_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)


def _run(device: torch.device, copy: Callable[[], None]) -> Event:
    # On the current stream: the caching allocator may reuse memory that this stream has freed. A
    # second stream would gain nothing, since the host fills the next buffer in any case.
    copy()
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _parts(source: Tensor, target: Tensor, n_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Split both into the same parts of at most `n_bytes` of the source, whole rows if they fit."""
    if source.nbytes <= n_bytes:
        if source.numel():
            yield source, target
        return
    row_bytes = source.nbytes // len(source)
    if row_bytes <= n_bytes:
        n_rows = n_bytes // row_bytes
        yield from zip(source.split(n_rows), target.split(n_rows), strict=True)
        return
    for row, place in zip(source, target, strict=True):
        yield from _parts(row, place, n_bytes)


def _view(buffer: Tensor, like: Tensor) -> Tensor:
    """The start of a uint8 buffer, as a contiguous tensor with the shape and dtype of `like`."""
    return buffer[: like.nbytes].view(like.dtype).view(like.shape)
