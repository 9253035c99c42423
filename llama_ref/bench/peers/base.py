"""What every contestant of a benchmark gives, and what it must read from memory for it."""

from collections.abc import Iterator
from typing import Protocol

from torch import nn

from llama_ref.args import ModelArgs


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


def weight_bytes(model: nn.Module, embedding: nn.Module) -> int:
    """Bytes of all weights and buffers but the embedding's, of which a step reads a row: one that the output shares counts."""
    held = {
        tensor.data_ptr(): tensor.nbytes
        for module in model.modules()
        if module is not embedding
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    return sum(held.values())


def kv_bytes(args: ModelArgs, itemsize: int) -> int:
    """Of one token's keys and values in all layers."""
    return 2 * args.n_layers * args.n_kv_heads * args.head_dim * itemsize
