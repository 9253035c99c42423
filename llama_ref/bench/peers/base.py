"""The interface that every contestant of a benchmark implements."""

from collections.abc import Iterator
from typing import Protocol


class Contestant(Protocol):
    """A loaded model.

    `precision` names the format of its weights. Each step reads `weight_bytes`, whatever the batch
    size, and `kv_bytes` per token of a sequence's context.
    """

    precision: str
    weight_bytes: int
    kv_bytes: int

    def steps(self, prompts: list[list[int]], gen_len: int) -> Iterator[list[int]]:
        """Decode greedily after prompts of equal length; yields each step's tokens, on the host."""
        ...

    def matmul_seconds(self, batch: int, prompt_len: int) -> float | None:
        """Time of the prompt's matrix products alone; None if it is not measured."""
        ...
