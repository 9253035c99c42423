"""What a benchmark has found."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from llama_ref.bench.settings import Settings


@dataclass(frozen=True)
class Spread:
    """The rounds' median, lowest and highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Round:
    """One contestant's turn at one batch size or context, in seconds and bytes. `tokens`: those of the first sequence."""

    first_seconds: float
    decode_seconds: float
    peak_bytes: int
    tokens: list[int]
    matmul_seconds: float | None


@dataclass(frozen=True)
class Work:
    """What a token costs at least: floating-point operations (a multiplication and an addition are two), and bytes read."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Result:
    """One contestant at one batch size.

    `first_token` in seconds; `prefill` and `decode` in tokens per second, of all sequences together. `bytes_per_token`: weights
    and, at half of what is made, keys and values, shared out among the sequences; `bandwidth_fraction` is how much of the
    measured bandwidth reading them took. `matmul_fraction`: of the prefill, what its matrix products take alone, at
    `matmul_flops` operations a second. Ratios are ours by theirs, round by round. `same_tokens`: how many of the first
    sequence's are ours, before one differs.
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
    """Ours, one sequence, after `context` tokens. `decode` in tokens per second, `kv_bytes` of `work.bytes` keys and values.

    `growth_fraction`: keys and values beyond the shortest context's, read in the time beyond its, of the measured bandwidth.
    """

    context: int
    decode: Spread
    work: Work
    kv_bytes: float
    bandwidth_fraction: float | None
    growth_fraction: float | None


@dataclass(frozen=True)
class Machine:
    system: str
    cpu: str
    cores: int
    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Report:
    """`bandwidth` in bytes per second, None where it could not be measured; `notes` say what is left out and why."""

    machine: Machine
    settings: Settings
    command: str
    bandwidth: Spread | None
    results: list[Result]
    long_results: list[LongResult]
    notes: list[str]
