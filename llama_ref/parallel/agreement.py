"""Check that all processes of a job use the same files and options, before they compute together.

Collective calls only work if every process makes the same ones. Different weights of the same shape
would mix two models' outputs; different shapes or numbers of tokens would make calls hang. So
before loading and before each generation, the processes exchange facts through the job's store and
compare them.
"""

import contextlib
import hashlib
import json
import logging
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from llama_ref.errors import JobError
from llama_ref.formatting import comma_list, printable
from llama_ref.parallel.heartbeat import Heartbeat, store_address
from llama_ref.parallel.peers import named, say, speaks_for

JOIN_SECONDS = 600.0  # limit for a process to join: as long as torchrun waits for a node
MEETING_SECONDS = 1800.0  # limit for later steps: the same as torch's for a collective call
FIRST_WARNING_SECONDS = 10.0  # the interval doubles after each warning
LOOK_SECONDS = 1.0  # interval between checks of which keys are missing
LONGEST_PAUSE_SECONDS = 0.05  # interval between checks of whether any key is missing
MOST_DIFFERENCES = 4  # shown in one message
LONGEST_VALUE = 60  # characters shown in a message
SHOWN_DIGITS = 12  # of the 64 hexadecimal digits of a SHA-256


class Agreement:
    """Compares facts with the other processes, step by step, through the job's store."""

    def __init__(self, store: Store, rank: int, world_size: int):
        self.store = store
        self._client = cast(Any, store).clone()
        self._rank, self._world_size = rank, world_size
        self._number = 0
        self.heartbeat = Heartbeat(store, rank, world_size)

    def check(self, step: str, facts: Mapping[str, object]) -> None:
        """Wait until all processes are at this step. Raises JobError if their facts differ.

        `step` is what the process does next ("loading the model"). All processes raise the same
        error. A fact is compared among the processes that have it.
        """
        own = {"host": socket.gethostname(), "facts": {"the next step": step} | {name: shown(facts[name]) for name in facts}}
        keys = [f"meeting/{self._number}/{rank}" for rank in range(self._world_size)]
        with _lost_store():
            self._client.set(keys[self._rank], json.dumps(own))
            self._wait(keys, step)
            found = [json.loads(text) for text in self._client.multi_get(keys)]
            if self._number:  # by now all processes have read the previous step's facts
                self._client.delete_key(f"meeting/{self._number - 1}/{self._rank}")
        self._number += 1
        self.heartbeat.all_have_joined({rank: printable(each["host"]) for rank, each in enumerate(found)})
        differing = list(differences([each["facts"] for each in found], self.heartbeat.hosts))
        if differing:
            more = len(differing) - MOST_DIFFERENCES
            raise JobError(
                f"the processes of this job differ before {step}: {'; '.join(differing[:MOST_DIFFERENCES])}"
                f"{f'; and {more} more' if more > 0 else ''}. Start all of them with the same files and options"
            )

    def _wait(self, keys: list[str], step: str) -> None:
        """Wait until all keys are set, and log who is missing.

        Raises JobError if they never will be.
        """
        started, pause = time.monotonic(), 0.0
        look_at, warn_at = LOOK_SECONDS, FIRST_WARNING_SECONDS
        while not self._client.check(keys):
            time.sleep(pause)
            pause = min(1.2 * pause + 1e-5, LONGEST_PAUSE_SECONDS)
            waited = time.monotonic() - started
            if waited < look_at:
                continue
            look_at = waited + LOOK_SECONDS
            missing = {rank for rank, key in enumerate(keys) if not self._client.check([key])}
            self._check_not_in_vain(missing, step, waited)
            if missing and waited >= warn_at:
                warn_at = 2 * waited
                if speaks_for(self._rank, missing | self.heartbeat.ended, self._world_size):
                    names = named(missing, self.heartbeat.hosts)
                    say(logging.WARNING, f"waiting for {names} before {step}, for {waited:.0f} s now")

    def _check_not_in_vain(self, missing: set[int], step: str, waited: float) -> None:
        if gone := missing & self.heartbeat.ended:
            names = named(gone, self.heartbeat.hosts)
            raise JobError(f"{names} ended before {step}, so this process cannot continue; see the messages there")
        limit = MEETING_SECONDS if self._number else JOIN_SECONDS
        if missing and waited >= limit:
            names = named(missing, self.heartbeat.hosts)
            raise JobError(f"waited {limit:g} s for {names} before {step}: start all processes of a job together")


def differences(facts: Sequence[Mapping[str, str]], hosts: Mapping[int, str]) -> Iterator[str]:
    """One phrase for each fact that differs among the ranks that have it."""
    for name in dict.fromkeys(name for each in facts for name in each):
        ranks_of: dict[str, list[int]] = {}
        for rank, each in enumerate(facts):
            if name in each:
                ranks_of.setdefault(each[name], []).append(rank)
        if len(ranks_of) > 1:
            found = [f"{value} on {named(ranks, hosts)}" for value, ranks in ranks_of.items()]
            yield f"{name} is {comma_list(found, MOST_DIFFERENCES)}"


def shown(value: object) -> str:
    """A value as text for a message; a long text is truncated and gets a digest."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    brief = printable(text)
    if len(brief) <= LONGEST_VALUE:
        return brief
    return f"{brief[:LONGEST_VALUE]}… (digest {digest(text.encode(errors='backslashreplace'))})"


def digest(data: bytes) -> str:
    """The first SHOWN_DIGITS digits of the data's SHA-256."""
    return hashlib.sha256(data).hexdigest()[:SHOWN_DIGITS]


@contextlib.contextmanager
def _lost_store() -> Iterator[None]:
    """Turn a store's error into a JobError: its process has ended, or the connection was closed."""
    try:
        yield
    except dist.DistError as error:
        raise JobError(
            f"the connection to {store_address()}, where the processes of this job meet, is lost: {error}"
        ) from error
