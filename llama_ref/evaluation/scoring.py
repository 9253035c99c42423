"""Log-probabilities of tokens in texts that are given, without all logits at once.

Shapes: B rows, T tokens each, D = dim, V = vocab_size. Logits are made for a few positions at a time:
for a window of 2,048 tokens and 128,256 words they would take 1 GB.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ref.compiled.caches import kv_cache_class, new_cache
from llama_ref.compiled.cuda_cache import MASKLESS_PREFILL_TOKENS
from llama_ref.decoding.loop import LOGPROB_POSITIONS, PREFILL_TOKENS, check_not_nan, prefill_tokens
from llama_ref.kv_cache import KVCache
from llama_ref.model import Transformer
from llama_ref.onednn import onednn_for


@dataclass(frozen=True)
class Score:
    """The log-probability (natural) of some tokens together; whether each was the most likely one."""

    logprob: float
    is_greedy: bool


@torch.inference_mode()
def score_rows(model: Transformer, rows: Sequence[tuple[Sequence[int], int]]) -> list[Score]:
    """Score the end of each row (ids, begin): the ids from `begin` (at least 1) on, given all before.

    Rows may differ in length. Raises LlamaRefError for logits that are NaN.
    """
    inputs = padded([ids[:-1] for ids, _ in rows])
    states = read(model, new_cache(model, *inputs.shape), inputs)
    return score_states(model, states, [(begin - 1, ids[begin:]) for ids, begin in rows])


def rows_at_once(model: Transformer, n_tokens: int) -> int:
    """How many rows of `n_tokens` tokens one pass reads."""
    needs_mask = kv_cache_class(model.device, model.dtype, model.args).needs_mask
    return max(1, (PREFILL_TOKENS if needs_mask else MASKLESS_PREFILL_TOKENS) // n_tokens)


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of ids, padded on the right: int64 (B, T). Causal attention never looks at the padding."""
    out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long, device="cpu")
    for row, tokens in zip(rows, out, strict=True):
        tokens[: len(row)] = torch.tensor(row, dtype=torch.long, device="cpu")
    return out


@torch.inference_mode()
def read(model: Transformer, cache: KVCache, tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Read tokens (B, T) after those in the cache, in pieces: (number of T before, states (B, n, D))."""
    begin = 0
    for piece in tokens.to(cache.lengths.device).split(max(1, prefill_tokens(cache) // len(tokens)), dim=1):
        with onednn_for(piece, model.dtype):
            hidden = model.hidden(piece, cache)
        yield begin, hidden
        begin += piece.shape[1]


@torch.inference_mode()
def score_states(
    model: Transformer, pieces: Iterator[tuple[int, Tensor]], wanted: Sequence[tuple[int, Sequence[int]]]
) -> list[Score]:
    """Score tokens by the states that predict them: of each row (position of the first state, ids)."""
    logprobs = [0.0] * len(wanted)
    greedy = [True] * len(wanted)
    for begin, hidden in pieces:
        for row, (first, ids) in enumerate(wanted):
            start, stop = max(begin, first), min(begin + hidden.shape[1], first + len(ids))
            if start < stop:
                targets = torch.tensor(ids[start - first : stop - first], dtype=torch.long, device=hidden.device)
                found = score_tokens(model, hidden[row, start - begin : stop - begin], targets)
                logprobs[row] += found.logprob
                greedy[row] &= found.is_greedy
    return [Score(*each) for each in zip(logprobs, greedy, strict=True)]


@torch.inference_mode()
def score_tokens(model: Transformer, states: Tensor, targets: Tensor) -> Score:
    """Score ids `targets` (N,) by the states (N, D) that predict them: float32 logits, a float64 sum."""
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    is_greedy = True
    for some, their in zip(states.split(LOGPROB_POSITIONS), targets.split(LOGPROB_POSITIONS), strict=True):
        with onednn_for(their, model.dtype):
            logits = model.logits(some)  # (n, V)
        total -= F.cross_entropy(logits, their, reduction="none").cpu().double().sum()
        is_greedy &= bool((logits.argmax(-1) == their).all())
    logprob = total.item()
    check_not_nan(logprob, model.dtype)
    return Score(logprob, is_greedy)
