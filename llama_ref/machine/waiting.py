"""Wait in the main thread for other threads, so that Ctrl-C ends the wait and leaves no lock held.

Python may raise KeyboardInterrupt between any two bytecodes of the main thread: also just after
`concurrent.futures` took a lock, which is then never released. And it does not raise it while the
thread waits for a lock, if that wait began as the signal arrived. So Ctrl-C is deferred, and raised
where no lock is held.
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

TICK_SECONDS = 0.1  # how often a wait checks for a deferred Ctrl-C

T = TypeVar("T")


class _Held:
    """Replaces the handler of Ctrl-C and calls it later, but at once for a second Ctrl-C."""

    def __init__(self, handler: Callable[[int, FrameType | None], object]):
        self._handler = handler
        self._has_come = self._is_passed_on = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._has_come:
            self._handler(number, frame)
        self._has_come = True

    def pass_on(self) -> None:
        """Call the handler, once, if Ctrl-C has come."""
        if self._has_come and not self._is_passed_on:
            self._is_passed_on = True
            self._handler(signal.SIGINT, None)


@contextmanager
def interrupt_held() -> Iterator[None]:
    """Defer Ctrl-C in the block: its handler runs in `as_they_end`, or else when the block ends.

    Does nothing if Ctrl-C is ignored, in a nested block, or outside the main thread.
    """
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not callable(before) or isinstance(before, _Held):
        yield
        return
    held = _Held(before)
    signal.signal(signal.SIGINT, held)
    try:
        yield
        held.pass_on()
    finally:
        signal.signal(signal.SIGINT, before)


def as_they_end(futures: Iterable[Future[T]]) -> Iterator[Future[T]]:
    """Yield each future when it is done. Raises what the handler of a deferred Ctrl-C raises."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, TICK_SECONDS, FIRST_COMPLETED)
        held = signal.getsignal(signal.SIGINT)
        if isinstance(held, _Held) and threading.current_thread() is threading.main_thread():
            held.pass_on()
        yield from done


def result_of(future: Future[T]) -> T:
    """Wait for a future's result. Raises the future's exception."""
    return next(as_they_end([future])).result()
