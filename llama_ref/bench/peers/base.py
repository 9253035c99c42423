"""What every contestant of a benchmark provides."""

from collections.abc import Iterator
from typing import Protocol


class Contestant(Protocol):
    """A model that stands ready.

    `precision` is what it calls the form of its weights; `weight_bytes` are read by every step, whatever the batch, `kv_bytes`
    for every token of a sequence's context.
    """

    precision: str
    weight_bytes: int
    kv_bytes: int

    def steps(self, prompts: list[list[int]], gen_len: int) -> Iterator[list[int]]:
        """Continue prompts of a length greedily: each step's token of every sequence, on the host; the prompts' pass first."""
        ...

    def matmul_seconds(self, batch: int, prompt_len: int) -> float | None:
        """How long the prompt's matrix products take alone; None for who is not asked."""
        ...
