"""Measure the memory bandwidth, which limits a model that reads all its weights for every token."""

import time
from pathlib import Path

import torch

from llama_ref.bench.peers.ours import synchronize
from llama_ref.bench.settings import Settings

PROBE_BYTES = 1 << 30  # far beyond any cache
ROWS, PASSES = 4096, 3


class Bandwidth:
    """Sums long rows with the contestants' threads; the fastest of several passes counts."""

    def __init__(self, settings: Settings, scratch: Path):
        self.buffer = torch.ones(ROWS, PROBE_BYTES // 4 // ROWS, device=settings.device)

    def bytes_per_second(self) -> float:
        return PROBE_BYTES / min(self._seconds() for _ in range(PASSES))

    def _seconds(self) -> float:
        synchronize(self.buffer.device)
        start = time.perf_counter()
        self.buffer.sum(-1)
        synchronize(self.buffer.device)
        return time.perf_counter() - start
