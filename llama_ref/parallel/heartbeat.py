"""Detect whether the other processes of a job are still running.

A process that is stopped, or behind a broken link, closes no connection, so a collective call would
wait for it for half an hour. Therefore each process has two threads. One increments a counter under
this process's key in the job's store, and reads the counters of the others. The second measures how
long each counter has not changed, because the first blocks if the store itself does not answer.
Both threads run while the process computes, loads or compiles.
"""

import contextlib
import itertools
import logging
import math
import os
import sys
import threading
import time
from typing import Any, NoReturn, cast

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from llama_ref.errors import RequestError
from llama_ref.parallel.peers import named, say, speaks_for

VARIABLE = "LLAMA_REF_HEARTBEAT_SECONDS"
DEFAULT_SECONDS = 30.0
BEATS_PER_LIMIT = 10  # minimum number of beats per limit
WARN_AFTER = 1 / 3  # fraction of the limit
LONGEST_INTERVAL_SECONDS = 1.0
LONGEST_SAYING_SECONDS = 5.0  # limit for writing to a stream that nobody reads
LEFT, FAILED = b"left", b"failed"  # replace the counter of a process that ends
WHY = "stopped, or the link is down"


class Heartbeat:
    """Tells other processes that this one is running, and ends it if another has stopped."""

    def __init__(self, store: Store, rank: int, world_size: int):
        self.hosts: dict[int, str] = {}  # by rank, once all have joined
        self.ended: set[int] = set()  # ranks that have announced their end
        self._limit = limit_seconds()
        self._interval = min(LONGEST_INTERVAL_SECONDS, self._limit / BEATS_PER_LIMIT)
        self._store = cast(Any, store).clone()  # a client can serve only one thread at a time
        self._rank = rank
        self._process = os.getpid()
        self._keys = [f"beat/{each}" for each in range(world_size)]
        self._stop = threading.Event()
        self._clock = 0.0  # seconds that this process was running, without stops
        self._replied = 0.0  # when the store last replied, by that clock
        self._counts = [b""] * world_size
        self._heard = [0.0] * world_size  # when each counter last changed, by that clock
        self._warned_about: set[int] = set()
        self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._watching = threading.Thread(target=self._watch, name="heartbeat watch", daemon=True)
        self._beating.start()
        self._watching.start()

    def all_have_joined(self, hosts: dict[int, str]) -> None:
        """Start to require a heartbeat of each process; `hosts` are by rank."""
        if not self.hosts:
            self._heard = [self._clock] * len(hosts)
            self.hosts = hosts

    def leave(self, failed: bool = False) -> None:
        """Tell the others that this process ends, so that they do not wait for it."""
        if os.getpid() != self._process:  # a forked child may end without ending this rank
            return
        self._stop.set()
        self._beating.join(LONGEST_INTERVAL_SECONDS)
        if not self._beating.is_alive():  # if it is alive, the store does not answer
            with contextlib.suppress(dist.DistError):
                self._store.set(self._keys[self._rank], FAILED if failed else LEFT)
                self._store.check(self._keys[:1])  # waits until the store has read the line above

    # ---- the first thread

    def _beat(self) -> None:
        try:
            for count in itertools.count():
                self._store.set(self._keys[self._rank], str(count))
                if all(self._counts) or self._store.check(self._keys):  # false until all have joined
                    self._read(self._store.multi_get(self._keys))
                self._replied = self._clock
                if self._stop.wait(self._interval):
                    return
        except dist.DistError:
            self._stop.set()  # the store's process has ended: calls that need it fail anyway

    def _read(self, counts: list[bytes]) -> None:
        for rank, count in enumerate(counts):
            if count != self._counts[rank]:
                self._heard[rank] = self._clock
                self._warned_about.discard(rank)
        self._counts = counts
        self.ended = {rank for rank, count in enumerate(counts) if count in (LEFT, FAILED)}

    # ---- the second

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(self._interval):
            now = time.monotonic()
            # Limit the step: a process that was stopped itself (Ctrl-Z) has missed the others' beats.
            self._clock += min(now - before, 2 * self._interval)
            before = now
            self._check_failed()
            self._check_silent()

    def _check_failed(self) -> None:
        failed = [rank for rank, count in enumerate(self._counts) if count == FAILED]
        # If all processes hit the same error, this one may be about to report it itself.
        if failed and self._clock - max(self._heard[rank] for rank in failed) >= LONGEST_INTERVAL_SECONDS:
            end_at_once(
                f"{named(failed, self.hosts)} ended with an error, so this process cannot continue; see the messages there"
            )

    def _check_silent(self) -> None:
        if not self.hosts:  # while processes join, Agreement says who is missing
            if self._clock - self._replied >= self._limit:
                end_at_once(f"{store_address()} has not answered for {self._limit:g} s: {WHY}")
            return
        silent = self._silent(self._limit)
        if silent:
            end_at_once(
                f"nothing was heard from {named(silent, self.hosts)} for {self._limit:g} s: {self._why()}. "
                f"This process cannot continue ({VARIABLE} sets the time)"
            )
        waiting = self._silent(self._limit * WARN_AFTER)
        if waiting - self._warned_about and speaks_for(self._rank, waiting | self.ended, len(self._keys)):
            self._warned_about |= waiting
            seconds = round(self._limit * WARN_AFTER)
            say_briefly(logging.WARNING, f"waiting for {named(waiting, self.hosts)}, silent for {seconds} s")

    def _why(self) -> str:
        others = len(self._keys) - 1 - len(self.ended)
        if others > 1 and self._clock - self._replied >= self._limit:
            return f"{store_address()}, through which they are heard, is {WHY}"
        return WHY

    def _silent(self, seconds: float) -> set[int]:
        """The other ranks not heard from for `seconds`, without those that have ended."""
        silent = {rank for rank, heard in enumerate(self._heard) if self._clock - heard >= seconds}
        return silent - self.ended - {self._rank}


def limit_seconds() -> float:
    """Seconds after which a silent process counts as lost.

    Raises RequestError for an invalid variable.
    """
    text = os.environ.get(VARIABLE, str(DEFAULT_SECONDS))
    with contextlib.suppress(ValueError):
        if 1 <= float(text) < math.inf:
            return float(text)
    raise RequestError(f"the environment variable {VARIABLE} is {text!r:.40}, expected a number of seconds, 1 or more")


def store_address() -> str:
    """The address of the job's store, from torchrun's environment."""
    return f"{os.environ.get('MASTER_ADDR', 'the first node')}:{os.environ.get('MASTER_PORT', '?')}"


def end_at_once(message: str) -> NoReturn:
    """Log the message and exit with code 1.

    Works from any thread, because the main one may be blocked.
    """
    try:
        say_briefly(logging.CRITICAL, message)
    finally:
        os._exit(1)


def say_briefly(level: int, message: str) -> None:
    """Log the message, waiting at most LONGEST_SAYING_SECONDS for a stream that nobody reads."""
    speaking = threading.Thread(target=_say_and_flush, args=(level, message), daemon=True)
    try:
        speaking.start()
    except RuntimeError:  # there are too many threads, or the interpreter is shutting down
        _say_and_flush(level, message)
    else:
        speaking.join(LONGEST_SAYING_SECONDS)


def _say_and_flush(level: int, message: str) -> None:
    say(level, message)
    sys.stdout.flush()
    sys.stderr.flush()
