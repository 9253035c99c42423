"""Wait in the main thread for others, such that Ctrl-C ends the wait and leaves no lock behind.

Python raises KeyboardInterrupt between any two steps of the main thread: also when `concurrent.futures`
has just taken a lock, which then nobody gives back, and not at all while the thread waits for a lock that
it began to wait for as the signal came. So Ctrl-C is held back, and raised where nothing is locked.
"""

import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

TICK_SECONDS = 0.1  # Ctrl-C waits no longer

T = TypeVar("T")


class _Held:
    """Takes the place of the handler of Ctrl-C; the second one is raised at once."""

    has_come = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.has_come:
            raise KeyboardInterrupt
        self.has_come = True

    def check(self) -> None:
        """Raise KeyboardInterrupt if it has come."""
        if self.has_come:
            raise KeyboardInterrupt


@contextmanager
def interrupt_held() -> Iterator[None]:
    """Hold Ctrl-C back while the block runs: `as_they_end`, or else the block's end, raises it.

    Where it would not be raised anyway, in another thread or with an own handler, nothing changes.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    held = _Held()
    signal.signal(signal.SIGINT, held)
    try:
        yield
        held.check()
    finally:
        signal.signal(signal.SIGINT, before)


def as_they_end(futures: Iterable[Future[T]]) -> Iterator[Future[T]]:
    """The futures, each when it is done. Raises KeyboardInterrupt if that was held back."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, TICK_SECONDS, FIRST_COMPLETED)
        held = signal.getsignal(signal.SIGINT)
        if isinstance(held, _Held) and threading.current_thread() is threading.main_thread():
            held.check()
        yield from done


def result_of(future: Future[T]) -> T:
    """Wait for a future's result. Raises what it raised."""
    return next(as_they_end([future])).result()
