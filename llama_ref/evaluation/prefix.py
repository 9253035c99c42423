"""Keys and values of a beginning that many texts share: computed once, copied into their rows."""

from collections.abc import Sequence

import torch

from llama_ref.compiled.caches import new_cache
from llama_ref.evaluation.scoring import padded, read
from llama_ref.kv_cache import KVCache
from llama_ref.model import Transformer


class PrefixCache:
    """The keys and values of the last beginning that was asked for, a cache of one row."""

    def __init__(self, model: Transformer):
        self._model = model
        self._ids: Sequence[int] = ()
        self._cache: KVCache | None = None

    def read(self, ids: Sequence[int]) -> KVCache | None:
        """The cache of these ids, until the next call; None for no ids. What it has is kept."""
        if not ids:
            return None
        if self._cache is None or self._cache.max_seq_len < len(ids):
            self._ids, self._cache = (), new_cache(self._model, 1, len(ids))
        known = shared_length(self._ids, ids)
        self._cache.truncate([known])
        if known < len(ids):
            for _ in read(self._model, self._cache, padded([ids[known:]])):
                pass
        self._ids = ids
        return self._cache


@torch.inference_mode()
def repeated(model: Transformer, cache: KVCache | None, rows: Sequence[int], n_tokens: int) -> KVCache:
    """A new cache with room for `n_tokens` a row, whose rows are copies of these of another one.

    Without another one the rows are empty.
    """
    out = new_cache(model, len(rows), n_tokens)
    if cache is None:
        return out
    n = cache.longest
    for layer in range(len(cache.keys)):  # one at a time: indexing makes another copy
        out.keys[layer, :, :, :n] = cache.keys[layer, rows, :, :n]
        out.values[layer, :, :, :n] = cache.values[layer, rows, :, :n]
    out.truncate(cache.lengths[list(rows)].tolist())
    return out


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return i
    return min(len(a), len(b))
