"""Try again, less and less often, as long as that helps."""

import random
import threading
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from llama_ref.download.outcomes import Stopped, Transient
from llama_ref.errors import DownloadError

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 600.0  # that a server may ask for
MOST_TRIES = 6  # in a row without a byte


class Retries:
    """Counts the failures of one request since it last got something."""

    def __init__(self, stop: threading.Event):
        self._stop, self._failures = stop, 0

    def pause(self, failure: Transient, has_progressed: bool = False) -> None:
        """Wait before the next try. Raises DownloadError after the last one, Stopped if `stop` is set."""
        self._failures = 1 if has_progressed else self._failures + 1
        if self._failures >= MOST_TRIES:
            raise DownloadError(f"{failure}, {MOST_TRIES} times in a row; start the command again later, it goes on from here")
        if failure.pause is not None and failure.pause > LONGEST_PAUSE_SECONDS:
            raise DownloadError(f"{failure}, and asks to wait for {failure.pause:,.0f} seconds; start the command again then")
        backoff = FIRST_PAUSE_SECONDS * 2 ** (self._failures - 1) * random.uniform(0.5, 1.5)
        if self._stop.wait(max(backoff, failure.pause or 0)):
            raise Stopped


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, given as a number or a date; None if it does not."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
