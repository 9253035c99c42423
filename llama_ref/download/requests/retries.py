"""Retry failed requests with exponential backoff."""

import random
import threading
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from llama_ref.download.requests.outcomes import Stopped, Transient
from llama_ref.errors import DownloadError

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 600.0  # the longest wait accepted from a server
MOST_TRIES = 6  # consecutive tries without receiving a byte


class Retries:
    """Counts the consecutive failures of one request since it last made progress."""

    def __init__(self, stop: threading.Event):
        self._stop, self._failures = stop, 0

    def pause(self, failure: Transient, has_progressed: bool = False) -> None:
        """Wait before the next try.

        Raises DownloadError after MOST_TRIES failures, Stopped if `stop` is set.
        """
        self._failures = 1 if has_progressed else self._failures + 1
        if self._failures >= MOST_TRIES:
            raise DownloadError(f"{failure}, {MOST_TRIES} times in a row; run the command again later, it continues from here")
        if failure.pause is not None and failure.pause > LONGEST_PAUSE_SECONDS:
            raise DownloadError(f"{failure}, and asks to wait for {failure.pause:,.0f} seconds; run the command again then")
        backoff = FIRST_PAUSE_SECONDS * 2 ** (self._failures - 1) * random.uniform(0.5, 1.5)
        if self._stop.wait(max(backoff, failure.pause or 0)):
            raise Stopped


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait from a Retry-After header, a number or a date; None without a valid one."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
