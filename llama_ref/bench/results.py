"""Data classes for the results of a benchmark."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from llama_ref.bench.settings import Settings


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest value of all rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def from_values(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Round:
    """One measurement of a contestant, in seconds and bytes.

    `tokens` are those of the first sequence.
    """

    first_seconds: float
    decode_seconds: float
    peak_bytes: int
    tokens: list[int]
    matmul_seconds: float | None


@dataclass(frozen=True)
class Work:
    """Lower bounds for the floating-point operations and bytes read per token; see costs.py."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Result:
    """One contestant at one batch size.

    `first_token` is in seconds; `prefill` and `decode` are tokens per second of all sequences
    together. `bytes_per_token` counts the weights, divided by the number of sequences, and the keys
    and values halfway through decoding; `bandwidth_fraction` is the share of the measured bandwidth
    that this uses. `matmul_fraction` is the time of the prefill's matrix products alone, as a share
    of the prefill, and `matmul_flops` their operations per second. Ratios are our speed divided by
    theirs, per round. `same_tokens` is the number of tokens of the first sequence before one
    differs from ours.
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

    `kv_bytes` is the part of `work.bytes` for keys and values. `growth_fraction` compares with the
    shortest context: the additional bytes of keys and values per additional second, as a share of
    the measured bandwidth.
    """

    context: int
    decode: Spread
    work: Work
    kv_bytes: float
    bandwidth_fraction: float | None
    growth_fraction: float | None


@dataclass(frozen=True)
class Machine:
    """Hardware and software of a benchmark; `versions` maps package names to versions."""

    system: str
    cpu: str
    cores: int
    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Report:
    """All results of a benchmark. `bandwidth` is in bytes per second.

    `notes` say what was left out and why, and whether other programs slowed the benchmark down.
    """

    machine: Machine
    settings: Settings
    command: str
    bandwidth: Spread | None
    results: list[Result]
    long_results: list[LongResult]
    notes: list[str]
