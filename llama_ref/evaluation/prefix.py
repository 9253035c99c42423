"""KV cache of a prefix that many texts share: computed once, then copied into their rows."""

from collections.abc import Sequence

import torch

from llama_ref.compiled.caches import new_cache
from llama_ref.decoding.reading import padded, read
from llama_ref.kv_cache import KVCache
from llama_ref.model import Transformer


class PrefixCache:
    """A one-row KV cache of the last prefix that was read."""

    def __init__(self, model: Transformer):
        self._model = model
        self._ids: Sequence[int] = ()
        self._cache: KVCache | None = None

    def read(self, ids: Sequence[int]) -> KVCache | None:
        """The cache of these ids, valid until the next call; None for no ids.

        Reuses the part that these ids share with the last prefix.
        """
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
    """A new cache with room for `n_tokens` per row.

    Its rows are copies of the given `rows` of `cache`.
    If `cache` is None, the rows are empty.
    """
    out = new_cache(model, len(rows), n_tokens)
    if cache is None:
        return out
    n = cache.longest
    for layer in range(len(cache.keys)):  # one layer at a time, because indexing makes a temporary copy
        out.keys[layer, :, :, :n] = cache.keys[layer, rows, :, :n]
        out.values[layer, :, :, :n] = cache.values[layer, rows, :, :n]
    out.truncate(cache.lengths[list(rows)].tolist())
    return out


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix of two token sequences."""
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return i
    return min(len(a), len(b))
