"""Pauses between tries grow, follow the server's Retry-After, and are limited."""

import threading
import time
from email.utils import formatdate

import pytest

from llama_ref.download.requests import retries
from llama_ref.download.requests.outcomes import Stopped, Transient
from llama_ref.download.requests.retries import MOST_TRIES, Retries, retry_after
from llama_ref.errors import DownloadError


class Clock(threading.Event):
    """Records pauses instead of waiting."""

    def __init__(self):
        super().__init__()
        self.pauses: list[float] = []

    def wait(self, timeout=None) -> bool:
        self.pauses.append(timeout)
        return self.is_set()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 1.0)
    return Clock()


def test_pauses_double_with_jitter_and_end(clock):
    tries = Retries(clock)
    for _ in range(MOST_TRIES - 1):
        tries.pause(Transient("it broke"))
    with pytest.raises(DownloadError, match="it broke, 6 times in a row"):
        tries.pause(Transient("it broke"))
    assert all(0.5 * 2**n <= pause <= 1.5 * 2**n for n, pause in enumerate(clock.pauses))


def test_progress_begins_the_count_again(clock):
    tries = Retries(clock)
    for _ in range(5 * MOST_TRIES):
        tries.pause(Transient("it broke"), has_progressed=True)
    assert max(clock.pauses) <= 1.5


def test_the_server_may_ask_for_longer_but_not_for_ever(clock):
    Retries(clock).pause(Transient("busy", 30.0))
    assert clock.pauses == [30.0]
    with pytest.raises(DownloadError, match="busy, and asks to wait for 601 seconds"):
        Retries(clock).pause(Transient("busy", 601.0))


def test_a_pause_ends_when_the_download_does(clock):
    clock.set()
    with pytest.raises(Stopped):
        Retries(clock).pause(Transient("it broke"))


def test_retry_after_is_a_number_or_a_date():
    assert retry_after({"retry-after": " 12 "}) == 12
    assert 90 < retry_after({"retry-after": formatdate(time.time() + 100, usegmt=True)}) <= 100
    assert retry_after({"retry-after": formatdate(0)}) == 0
    for value in ("", "soon", "-5", "1e3", "²"):
        assert retry_after({"retry-after": value}) is None
