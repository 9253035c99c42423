"""Log-probabilities of the tokens of given texts, computed without holding all logits at once.

Shapes: B rows, T tokens each, D = dim, V = vocab_size. Logits are computed for a few positions at a
time: for a window of 2,048 tokens and a vocabulary of 128,256 they would take 1 GB.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ref.compiled.caches import kv_cache_class, new_cache
from llama_ref.decoding.loop import LOGPROB_POSITIONS, check_not_nan
from llama_ref.decoding.reading import padded, prefill_tokens, read
from llama_ref.machine.onednn import onednn_for
from llama_ref.model import Transformer


@dataclass(frozen=True)
class Score:
    """Total log-probability (natural) of some tokens, and whether each is the likeliest."""

    logprob: float
    is_greedy: bool


@torch.inference_mode()
def score_rows(model: Transformer, rows: Sequence[tuple[Sequence[int], int]]) -> list[Score]:
    """Score each row (ids, begin): the ids from `begin` (1 or more) to the end.

    Rows may differ in length. Raises LlamaRefError for NaN logits.
    """
    inputs = padded([ids[:-1] for ids, _ in rows])
    states = read(model, new_cache(model, *inputs.shape), inputs, [len(ids) - 1 for ids, _ in rows])
    return score_states(model, states, [(begin - 1, ids[begin:]) for ids, begin in rows])


def rows_at_once(model: Transformer, n_tokens: int) -> int:
    """Number of rows of `n_tokens` tokens that one pass can read."""
    return max(1, prefill_tokens(kv_cache_class(model.device, model.dtype, model.args)) // n_tokens)


@torch.inference_mode()
def score_states(
    model: Transformer, pieces: Iterator[tuple[int, Tensor]], wanted: Sequence[tuple[int, Sequence[int]]]
) -> list[Score]:
    """Score each row's ids, given as (position of the state that predicts the first id, ids)."""
    logprobs: list[list[float]] = [[] for _ in wanted]
    are_greedy: list[list[bool]] = [[] for _ in wanted]
    for begin, hidden in pieces:
        states: list[Tensor] = []  # of all rows together, so that the output matrix is read once
        targets: list[int] = []
        rows: list[int] = []
        for row, (first, ids) in enumerate(wanted):
            start, stop = max(begin, first), min(begin + hidden.shape[1], first + len(ids))
            if start < stop:
                states.append(hidden[row, start - begin : stop - begin])
                targets += ids[start - first : stop - first]
                rows += [row] * (stop - start)
        if states:
            for row, logprob, is_greedy in zip(rows, *score_tokens(model, torch.cat(states), targets), strict=True):
                logprobs[row].append(logprob)
                are_greedy[row].append(is_greedy)
    totals = [math.fsum(each) for each in logprobs]
    return [Score(total, all(each)) for total, each in zip(totals, are_greedy, strict=True)]


@torch.inference_mode()
def score_tokens(model: Transformer, states: Tensor, targets: Sequence[int]) -> tuple[list[float], list[bool]]:
    """Log-probabilities of N ids from the states (N, D) that predict them; is each the likeliest?

    Raises LlamaRefError for NaN logits.
    """
    ids = torch.tensor(targets, dtype=torch.long, device=states.device)
    logprobs: list[float] = []
    are_greedy: list[bool] = []
    for some, their in zip(states.split(LOGPROB_POSITIONS), ids.split(LOGPROB_POSITIONS), strict=True):
        with onednn_for(their, model.dtype):
            logits = model.logits(some)  # float32 (n, V)
        logprobs += (0 - F.cross_entropy(logits, their, reduction="none")).tolist()
        are_greedy += (logits.argmax(-1) == their).tolist()
    check_not_nan(math.fsum(logprobs), model.dtype)
    return logprobs, are_greedy
