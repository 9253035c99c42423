"""Turn oneDNN off during decode steps on a CPU, also when several threads run passes.

oneDNN reorders a bfloat16 matrix before a product, which pays off only for many rows: for a single
row PyTorch's own kernel takes two thirds of its time (`llama-ref bench`). PyTorch has no operator
that avoids oneDNN, only a process-wide flag. So passes that want it off and passes that want it on
wait for each other; passes of one kind run concurrently. A pass computes the same numbers, whatever
other threads do.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor


class _Mode:
    """A lock with two modes: any number of threads share it in one mode, in order of arrival."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: deque[object] = deque()
        self._holders = 0
        self._is_off = False
        self._before = True

    @contextlib.contextmanager
    def hold(self, off: bool) -> Iterator[None]:
        self._acquire(off)
        try:
            yield
        finally:
            self._release()

    def _acquire(self, off: bool) -> None:
        ticket = object()
        with self._condition:
            self._waiting.append(ticket)
            try:
                self._condition.wait_for(lambda: self._waiting[0] is ticket and (not self._holders or self._is_off == off))
                if not self._holders and off:
                    self._before = _set_enabled(False)
                self._holders += 1
                self._is_off = off
            finally:  # also when interrupted while waiting
                self._waiting.remove(ticket)
                self._condition.notify_all()

    def _release(self) -> None:
        with self._condition:
            self._holders -= 1
            if not self._holders and self._is_off:
                _set_enabled(self._before)
            self._condition.notify_all()


_mode = _Mode()


@contextlib.contextmanager
def onednn_for(tokens: Tensor, dtype: torch.dtype) -> Iterator[None]:
    """Context of a forward pass over ids `tokens` in `dtype`: turns oneDNN off for a single token.

    Does nothing unless the pass is on a CPU in bfloat16.
    """
    if tokens.device.type != "cpu" or dtype != torch.bfloat16:
        yield
        return
    with _mode.hold(off=tokens.numel() == 1):
        yield


def _set_enabled(enabled: bool) -> bool:
    """Set the process-wide flag; returns its previous value."""
    before: bool = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(enabled)
    return before
