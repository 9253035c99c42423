"""The KV cache that the compiled decode step on a CPU reads, block by block."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ref.kv_cache import KVCache
from llama_ref.model import Context

CACHE_BLOCK = 64  # tokens; small enough to stay in the L1 cache
FEWEST_BLOCKS = 2  # torch.compile specializes lengths of 0 and 1


@dataclass(frozen=True)
class Blocks:
    """A cache's blocks during one decode step of one row.

    `keys` and `values`: per layer (K, …, 64, hd). `mask`: float32 (n, 64), 0 where a slot of the first
    n blocks holds a token, else -inf.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor


class BlockKVCache(KVCache):
    """A KV cache with a view of its first row in blocks."""

    _blocks: tuple[Context, Blocks] | None = None  # of the current pass

    def blocks(self, context: Context) -> Blocks:
        """The blocks, prepared once for all layers of a pass."""
        if self._blocks is None or self._blocks[0] is not context:
            self._blocks = context, self._new_blocks()
        return self._blocks[1]

    def advance(self, n_tokens: int) -> None:
        self._blocks = None
        super().advance(n_tokens)

    def _new_blocks(self) -> Blocks:
        keys, values = (
            stored[:, 0].unflatten(2, (-1, CACHE_BLOCK)).unbind() for stored in (self.keys, self.values)
        )  # n_layers × (K, …, 64, hd)
        n_blocks = max(FEWEST_BLOCKS, -(-self.longest // CACHE_BLOCK))
        # One mask for all layers: comparing positions costs more in every layer and head.
        mask = self.keys.new_zeros(n_blocks * CACHE_BLOCK, dtype=torch.float32)
        mask[self.longest :] = -torch.inf
        mask = mask.view(n_blocks, CACHE_BLOCK)
        for tensor, dim in ((mask, 0), *((tensor, 1) for tensor in (*keys, *values))):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
        return Blocks(keys, values, mask)
