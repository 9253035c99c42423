"""Read tokens into a KV cache in pieces, and keep the states that are needed."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from llama_ref.compiled.cuda_cache import MASKLESS_PREFILL_TOKENS
from llama_ref.kv_cache import KVCache
from llama_ref.machine.onednn import onednn_for
from llama_ref.model import Transformer

PREFILL_TOKENS = 1024  # per pass, over all rows: bounds the size of activations and masks


def prefill_tokens(cache: KVCache | type[KVCache]) -> int:
    """Prompt tokens per forward pass, over all rows."""
    return PREFILL_TOKENS if cache.needs_mask else MASKLESS_PREFILL_TOKENS


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of ids, padded on the right, where no token attends to the padding: int64 (B, T)."""
    out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long, device="cpu")
    for row, tokens in zip(rows, out, strict=True):
        tokens[: len(row)] = torch.tensor(row, dtype=torch.long, device="cpu")
    return out


@torch.inference_mode()
def read(model: Transformer, cache: KVCache, tokens: Tensor, ends: Sequence[int] | None = None) -> Iterator[tuple[int, Tensor]]:
    """Read tokens (B, T) after those in the cache, in pieces: (a piece's begin in T, its states (B, n, D)).

    `ends` are the positions where the rows' texts end, if padding follows.
    """
    begin = 0
    for piece in tokens.to(cache.lengths.device).split(max(1, prefill_tokens(cache) // len(tokens)), dim=1):
        with onednn_for(piece, cache.keys.dtype), cache.padding_from(ends):
            hidden = model.hidden(piece, cache)
        yield begin, hidden
        begin += piece.shape[1]


@torch.inference_mode()
def last_states(pieces: Iterable[tuple[int, Tensor]], lengths: Sequence[int]) -> Tensor:
    """Each row's state after its last token: (B, D)."""
    last: list[Tensor | None] = [None] * len(lengths)
    for begin, hidden in pieces:
        for row, length in enumerate(lengths):
            if begin < length <= begin + hidden.shape[1]:
                last[row] = hidden[row, length - 1 - begin].clone()  # a view would keep the whole piece
    return torch.stack([state for state in last if state is not None])
