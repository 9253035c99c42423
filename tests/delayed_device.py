"""A fake GPU for tests of asynchronous copies, which copies as late as a GPU might."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from llama_ref.checkpoint.loading import loader
from llama_ref.checkpoint.loading.to_device import PinnedCopier


class DelayedDevice:
    """Runs submitted copies in order, but only when an event is waited for.

    A buffer that is reused without waiting therefore gives its new bytes to the old target. With
    `at_once`, copies run when submitted: for code that computes with a copied tensor, which a GPU
    would do after the copies of the same stream. `log` holds ("submit" or "wait", copy's number).
    """

    def __init__(self, at_once: bool = False) -> None:
        self.at_once = at_once
        self.queue: deque[tuple[int, Callable[[], None]]] = deque()
        self.log: list[tuple[str, int]] = []
        self.submitted = 0

    def submit(self, copy: Callable[[], None]) -> "DelayedEvent":
        self.queue.append((self.submitted, copy))
        self.log.append(("submit", self.submitted))
        self.submitted += 1
        event = DelayedEvent(self, self.submitted - 1)
        if self.at_once:
            event.run()
        return event


class DelayedEvent:
    def __init__(self, device: DelayedDevice, number: int):
        self.device, self.number = device, number

    def synchronize(self) -> None:
        self.device.log.append(("wait", self.number))
        self.run()

    def run(self) -> None:
        while self.device.queue and self.device.queue[0][0] <= self.number:
            self.device.queue.popleft()[1]()


def host_buffers(n_bytes: int, count: int = 2) -> list[Tensor]:
    return [torch.zeros(n_bytes, dtype=torch.uint8) for _ in range(count)]


@contextmanager
def loading_through(n_bytes: int, at_once: bool = False) -> Iterator[DelayedDevice]:
    """In the block, load_model copies through buffers of `n_bytes` on any device."""
    device = DelayedDevice(at_once)

    @contextmanager
    def copier(_: object) -> Iterator[PinnedCopier]:
        copier = PinnedCopier(host_buffers(n_bytes), device.submit)
        yield copier
        copier.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "pinned_copier", copier)
        yield device
