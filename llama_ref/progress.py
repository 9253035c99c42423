"""Progress of long functions, which report it to the caller's callback and never print."""

from collections.abc import Callable
from pathlib import Path

# Called with (done, total), in the unit that the reporting function documents: bytes, tensors,
# steps.
Progress = Callable[[int, int], None]
# Called with (path, bytes done, total bytes) of one of several files, from several threads.
FileProgress = Callable[[Path, int, int], None]


class ProgressCounter:
    """Counts what is done of a known total, and reports it to an optional callback."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total = 0, total
        self._progress = progress

    def advance(self, n: int = 1) -> None:
        """Count `n` more and report. `advance(0)` reports the start."""
        self.done += n
        if self._progress is not None:
            self._progress(self.done, self.total)
