"""Wait in the main thread for others, such that Ctrl-C ends the wait and leaves no lock behind.

Python raises KeyboardInterrupt between any two steps of the main thread: also when `concurrent.futures`
has just taken a lock, which then nobody gives back, and not at all while the thread waits for a lock that
it began to wait for as the signal came. So Ctrl-C is held back, and raised where nothing is locked.
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

TICK_SECONDS = 0.1  # Ctrl-C waits no longer

T = TypeVar("T")


class _Held:
    """Takes the place of the handler of Ctrl-C, and calls it later; for the second Ctrl-C at once."""

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
    """Hold Ctrl-C back while the block runs: `as_they_end`, or else the block's end, calls its handler.

    Nothing changes where it is ignored, in a block within such a block, and in other threads.
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
    """The futures, each when it is done. Raises what the handler of a held Ctrl-C does."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, TICK_SECONDS, FIRST_COMPLETED)
        held = signal.getsignal(signal.SIGINT)
        if isinstance(held, _Held) and threading.current_thread() is threading.main_thread():
            held.pass_on()
        yield from done


def result_of(future: Future[T]) -> T:
    """Wait for a future's result. Raises what it raised."""
    return next(as_they_end([future])).result()
