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

from llama_ref.machine.waiting import TICK_SECONDS, interrupt_held


class _Mode:
    """A lock with two modes: any number of threads share it in one mode, in order of arrival.

    Ctrl-C may be raised in the main thread between any two steps. While this lock changes it is held
    back; if it comes just before a pass releases the lock, the thread's next pass does so.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: deque[int] = deque()  # threads
        self._holders: dict[int, object] = {}  # by thread: its pass
        self._is_off = False
        self._before = True

    @contextlib.contextmanager
    def hold(self, off: bool) -> Iterator[None]:
        own = object()
        try:
            while not self._acquire(own, off):
                pass  # Ctrl-C is raised between two attempts
            yield
        finally:
            self._release(own)

    def _acquire(self, own: object, off: bool) -> bool:
        """Wait a moment for the lock; whether it is held now."""
        thread = threading.get_ident()
        with interrupt_held(), self._condition:
            self._drop(thread)  # passes of a thread do not overlap: that one was interrupted
            if thread not in self._waiting:
                self._waiting.append(thread)
            if not self._condition.wait_for(lambda: self._admits(thread, off), TICK_SECONDS):
                return False
            self._waiting.remove(thread)
            if not self._holders and off:
                self._before = _set_enabled(False)
            self._holders[thread] = own
            self._is_off = off
            self._condition.notify_all()
            return True

    def _admits(self, thread: int, off: bool) -> bool:
        return self._waiting[0] == thread and (not self._holders or self._is_off == off)

    def _release(self, own: object) -> None:
        thread = threading.get_ident()
        with interrupt_held(), self._condition:
            if thread in self._waiting:
                self._waiting.remove(thread)
            if self._holders.get(thread) is own:
                self._drop(thread)
            self._condition.notify_all()

    def _drop(self, thread: int) -> None:
        """Remove a thread's pass, if it has one; the last one restores the flag."""
        if self._holders.pop(thread, None) is not None and not self._holders and self._is_off:
            _set_enabled(self._before)


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
