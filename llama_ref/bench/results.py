"""Results of a benchmark."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from llama_ref.bench.settings import Settings


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def from_values(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Round:
    """One measurement of a contestant, in seconds and bytes; `tokens` are the first sequence's."""

    first_seconds: float
    decode_seconds: float
    peak_bytes: int
    tokens: list[int]
    matmul_seconds: float | None


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes read that a token costs at least; see costs.py."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Result:
    """One contestant at one batch size.

    `first_token` is in seconds; `prefill` and `decode` are tokens per second of all sequences
    together. `bytes_per_token` counts the weights, divided by the number of sequences, and the keys
    and values halfway through decoding; `bandwidth_fraction` is the share of the measured bandwidth
    that this needs. `matmul_fraction` is the share of the prefill that its matrix products take
    alone, at `matmul_flops` operations per second. Ratios are our speed over theirs, by round.
    `same_tokens` counts the first sequence's tokens before one differs from ours.
    """

    contestant: str
    precision: str
    batch: int
    first_token: Spread
    prefill: Spread
    decode: Spread
    peak_bytes: int
    bytes_per_token: float
    bandwidth_fraction: float | None
    matmul_fraction: float | None
    matmul_flops: float | None
    prefill_work: Work
    decode_work: Work
    prefill_ratio: Spread | None
    decode_ratio: Spread | None
    same_tokens: int


@dataclass(frozen=True)
class LongResult:
    """Our decoding of one sequence after `context` tokens; `decode` in tokens per second.

    `kv_bytes` is the part of `work.bytes` that is keys and values. `growth_fraction` compares with
    the shortest context: extra bytes of keys and values per extra time, as a share of the measured
    bandwidth.
    """

    context: int
    decode: Spread
    work: Work
    kv_bytes: float
    bandwidth_fraction: float | None
    growth_fraction: float | None


@dataclass(frozen=True)
class Machine:
    """Hardware and software of a benchmark; `versions` are by package."""

    system: str
    cpu: str
    cores: int
    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Report:
    """A whole benchmark. `bandwidth` is bytes per second.

    `notes` say what is left out and why, and whether other programs slowed it down.
    """

    machine: Machine
    settings: Settings
    command: str
    bandwidth: Spread | None
    results: list[Result]
    long_results: list[LongResult]
    notes: list[str]
