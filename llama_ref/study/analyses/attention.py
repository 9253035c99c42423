"""Scores of every attention head: sink, previous token, induction and entropy.

A head that finds nothing to attend to attends to the first token, the sink (Xiao et al., "Efficient
Streaming Language Models with Attention Sinks", 2023). An induction head, at the second `A` of
`A B … A`, attends to `B`. On a repeated random sequence, only induction predicts the next token
(Olsson et al., "In-context Learning and Induction Heads", 2022).
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.formatting import human_bytes
from llama_ref.model import Transformer
from llama_ref.numbers import is_whole
from llama_ref.parallel.division import whole_args
from llama_ref.study.inputs import check_index, check_token, one_row, seeded
from llama_ref.study.report.packing import watch_patterns
from llama_ref.study.trace import trace
from llama_ref.study.vision.images import Images

LARGEST_LAYER = 1 << 32  # bytes of one layer's patterns; up to three copies exist at once
REPEATED_TOKENS = 50


@dataclass(frozen=True)
class AttentionSummary:
    """Scores of every head on one sequence: (n_layers, H) each, on the CPU; NaN if it is too short.

    `sink`: mean attention of later tokens to the first. `previous`: mean attention to the token
    before, except where that is the first. `entropy`: mean entropy of the attention in nats, without
    the first token's. `induction`: on a repeated random sequence, mean attention to the token that
    followed the first time.
    """

    tokens: list[int]
    sink: Tensor
    previous: Tensor
    entropy: Tensor
    induction: Tensor


def sink_mass(pattern: Tensor) -> Tensor:
    """Mean attention of later tokens to the first: (…, T, T) -> (…)."""
    return pattern[..., 1:, 0].mean(-1)


def previous_token_score(pattern: Tensor) -> Tensor:
    """Mean attention to the token before, except where that is the sink: (…, T, T) -> (…)."""
    return pattern.diagonal(offset=-1, dim1=-2, dim2=-1)[..., 1:].mean(-1)


def attention_entropy(pattern: Tensor) -> Tensor:
    """Mean entropy of attention in nats, without the first token's: (…, T, T) -> (…)."""
    return torch.special.entr(pattern[..., 1:, :]).sum(-1).mean(-1)


def induction_score(pattern: Tensor, period: int) -> Tensor:
    """Mean attention of the last `period` tokens to the token after each one's first occurrence: (…, T, T) -> (…)."""
    return pattern.diagonal(offset=1 - period, dim1=-2, dim2=-1)[..., -period:].mean(-1)


@torch.no_grad()
def summarize_attention(
    model: Transformer,
    tokens: Sequence[int] | Tensor,
    *,
    bos: int | None = None,
    ids: Sequence[int] | None = None,
    seed: int = 1,
    images: Images | None = None,
    see: Callable[[Tensor], None] = lambda pattern: None,
) -> AttentionSummary:
    """Score every head on a sequence, and on `repeated_tokens` for the induction score.

    Holds one layer's patterns at a time. `images` as in `trace`. `see` is called with the patterns of
    the sequence, float32 (H, T, T), layer by layer. Raises RequestError before the model runs.
    """
    row = one_row(model, tokens)
    _check_length(model, row.shape[1])
    repeated = repeated_tokens(model, bos=bos, ids=ids, seed=seed)
    measures = (sink_mass, previous_token_score, attention_entropy)
    sink, previous, entropy = _measure(model, row, measures, see, images)
    (induction,) = _measure(model, repeated, [lambda pattern: induction_score(pattern, REPEATED_TOKENS)])
    return AttentionSummary(row[0].tolist(), sink, previous, entropy, induction)


def repeated_tokens(
    model: Transformer,
    n_tokens: int = REPEATED_TOKENS,
    *,
    bos: int | None = None,
    ids: Sequence[int] | None = None,
    seed: int = 1,
) -> Tensor:
    """Draw `n_tokens` random ids and repeat them, after `bos` if given: (1, T).

    The ids are drawn from `ids` (default: the whole vocabulary).
    """
    if not is_whole(n_tokens) or n_tokens < 2:
        raise RequestError(f"n_tokens is {n_tokens!r:.40}, expected a whole number of 2 or more")
    pool = torch.arange(model.args.vocab_size, device="cpu") if ids is None else _pool(ids)
    generator = seeded(seed)
    drawn = pool[torch.randint(len(pool), (n_tokens,), generator=generator, device="cpu")]
    before = torch.tensor([] if bos is None else [check_token(model, bos)], dtype=drawn.dtype, device="cpu")
    return one_row(model, torch.cat((before, drawn, drawn)))


def _pool(ids: Sequence[int]) -> Tensor:
    if not len(ids):
        raise RequestError("ids is empty, expected the ids to draw random tokens from")
    try:
        return torch.tensor([operator.index(token) for token in ids], device="cpu")
    except TypeError:
        raise RequestError(f"ids is {ids!r:.60}, expected a list of the ids to draw random tokens from") from None


@torch.no_grad()
def attention_pattern(
    model: Transformer, tokens: Sequence[int] | Tensor, layer: int, head: int, *, images: Images | None = None
) -> Tensor:
    """One head's attention weights: float32 (T, T); the row of each query adds up to 1. `images` as in `trace`."""
    row = one_row(model, tokens)
    _check_length(model, row.shape[1])
    layer = check_index("layer", layer, whole_args(model).n_layers)
    head = check_index("head", head, model.args.n_heads)
    name = f"layers.{layer}.attention.pattern"
    return trace(model, row, [name], images=images)[name][0, head].float().cpu()


def _check_length(model: Transformer, n_tokens: int) -> None:
    """Raise RequestError if one layer's patterns, float32 (H, T, T), are too large."""
    H = model.args.n_heads
    if 4 * H * n_tokens**2 > LARGEST_LAYER:
        raise RequestError(
            f"the text has {n_tokens:,} tokens, and every head's attention is a matrix of tokens by tokens:"
            f" {human_bytes(4 * H * n_tokens**2)} in one layer; shorten it to {math.isqrt(LARGEST_LAYER // (4 * H)):,} tokens"
        )


def _measure(
    model: Transformer,
    row: Tensor,
    measures: Sequence[Callable[[Tensor], Tensor]],
    see: Callable[[Tensor], None] = lambda pattern: None,
    images: Images | None = None,
) -> list[Tensor]:
    """Apply each measure to every head, in one pass: (n_layers, H) each."""
    layers: list[list[Tensor]] = []

    def look(pattern: Tensor) -> None:
        layers.append([measure(pattern).cpu() for measure in measures])
        see(pattern)

    watch_patterns(model, row, look, images)
    return [torch.stack(column) for column in zip(*layers, strict=True)]
