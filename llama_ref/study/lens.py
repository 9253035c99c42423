"""The logit lens: what the model would say next, had it stopped here. Source: nostalgebraist, "interpreting GPT" (2020).

The final norm and the output matrix are put onto the residual stream at every point: after the embedding, after each layer's
attention, after each layer's feed-forward. At the last point this is the model itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vecdot

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.study.inputs import check_index, check_token, one_row
from llama_ref.study.trace import trace

LOGITS_AT_A_TIME = 1 << 22  # float32: 16 MB, of which a handful are held at once


@dataclass(frozen=True)
class LogitLens:
    """What each of P points of the residual stream says after T of a text's tokens, those at `positions`; all on the CPU.

    `points` are the trace's names for them. `top_ids` and `top_probabilities` (P, T, k), likeliest first. `entropy` and `kl`
    (P, T) in nats; the latter is KL(model's own distribution ‖ the point's). `target_probability` and `target_rank` (P, T),
    rank 1 being the likeliest, are None where no target was named.
    """

    tokens: list[int]
    positions: list[int]
    points: list[str]
    top_ids: Tensor
    top_probabilities: Tensor
    entropy: Tensor
    kl: Tensor
    target: int | None = None
    target_probability: Tensor | None = None
    target_rank: Tensor | None = None


def residual_points(n_layers: int) -> list[str]:
    """The trace's names of all 2 · n_layers + 1 points of the residual stream, in order."""
    parts = [f"layers.{layer}.residual_{part}" for layer in range(n_layers) for part in ("mid", "post")]
    return ["embedding", *parts]


@torch.no_grad()
def logit_lens(
    model: Transformer,
    tokens: Sequence[int] | Tensor,
    *,
    target: int | None = None,
    top: int = 5,
    positions: Sequence[int] | None = None,
) -> LogitLens:
    """Read the residual stream of one sequence at all its points through the final norm and the output matrix.

    `positions` (default: all) may count from the end. Holds the stream itself, D numbers for each point and token, and logits
    of one point and a few positions at a time; each position costs as many output matrices as there are points. Raises
    RequestError.
    """
    row = one_row(model, tokens)
    T = row.shape[1]
    at = list(range(T)) if positions is None else [check_index("position", position, T) for position in positions]
    if not at:
        raise RequestError("positions is empty, expected those to read at, or None for all")
    if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= model.args.vocab_size:
        raise RequestError(f"top is {top!r:.40}, expected a whole number from 1 to {model.args.vocab_size}")
    target = None if target is None else check_token(model, target)
    points = residual_points(model.args.n_layers)
    traced = trace(model, row, points)
    residuals = [traced[point][0, at] for point in points]  # P × (T, D)
    step = max(1, LOGITS_AT_A_TIME // model.args.vocab_size)
    chunks = [_read(model, [x[i : i + step] for x in residuals], target, top) for i in range(0, len(at), step)]
    probability, rank, ids, probabilities, entropy, kl = (torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True))
    seen = {} if target is None else {"target_probability": probability, "target_rank": rank}
    return LogitLens(row[0].tolist(), at, points, ids, probabilities, entropy, kl, target, **seen)


def _read(model: Transformer, residuals: list[Tensor], target: int | None, top: int) -> tuple[Tensor, ...]:
    """Some positions at all points, P × (t, D): the target's probability and rank, top ids and theirs, entropy, KL."""
    final = _log_probabilities(model, residuals[-1])  # (t, V)
    p_final = final.exp()
    certainty = vecdot(p_final, final)  # (t,), minus the entropy
    rows = []
    for residual in residuals:
        logprobs = _log_probabilities(model, residual)
        kl = (certainty - vecdot(p_final, logprobs)).clamp(min=0)  # rounding may leave a little below 0
        rows.append((*_of_target(logprobs, target or 0), *_likeliest(logprobs, top), -vecdot(logprobs.exp(), logprobs), kl))
    return tuple(torch.stack(column).cpu() for column in zip(*rows, strict=True))


def _log_probabilities(model: Transformer, residual: Tensor) -> Tensor:
    """(t, D) -> float32 (t, V)."""
    return model.logits(model.norm(residual)).log_softmax(-1)


def _of_target(logprobs: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """A token's probability and rank, (t,) each; where numbers are NaN it is behind all others."""
    own = logprobs[:, target, None]
    before = (logprobs <= own).logical_not_()
    return own[:, 0].exp(), 1 + torch.count_nonzero(before, dim=-1)


def _likeliest(logprobs: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Ids and probabilities of the likeliest tokens, (t, top) each."""
    best = logprobs.topk(top, dim=-1)
    return best.indices, best.values.exp()
