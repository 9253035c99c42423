"""Metrics of patched texts: a number computed from the logits after the last token."""

from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.numbers import is_whole
from llama_ref.study.texts import Batch

Metric = Callable[[Tensor], Tensor]  # logits (n, V) after the last token -> (n,)


def logit_difference(target: int, other: int) -> Metric:
    """A metric: the target's logit minus the other token's."""

    def difference(logits: Tensor) -> Tensor:
        return logits[:, _check_token(target, logits)] - logits[:, _check_token(other, logits)]

    return difference


def probability(target: int) -> Metric:
    """A metric: the target's probability."""
    return lambda logits: logits.float().softmax(-1)[:, _check_token(target, logits)]


def log_probability(target: int) -> Metric:
    """A metric: the target's log-probability, whose gradient does not vanish where the token is improbable."""
    return lambda logits: logits.float().log_softmax(-1)[:, _check_token(target, logits)]


def measure(model: Transformer, batch: Batch, metrics: Sequence[Metric]) -> Tensor:
    """Run texts in one pass, and apply each one's metric: float32 (n,), on the model's device."""
    return measure_hidden(model, batch, batch.hidden(model), metrics)


def measure_hidden(model: Transformer, batch: Batch, hidden: Tensor, metrics: Sequence[Metric]) -> Tensor:
    """Apply each text's metric to the logits of the final norm's output (n, T, D): float32 (n,)."""
    logits = model.logits(batch.last(hidden))  # (n, V)
    found = []
    for metric, own in groupby(zip(metrics, logits, strict=True), key=itemgetter(0)):
        found.append(_apply(metric, torch.stack([row for _, row in own])))
    return torch.cat(found)


def _apply(metric: Metric, logits: Tensor) -> Tensor:
    out = metric(logits)
    if not isinstance(out, Tensor) or out.shape != logits.shape[:1]:
        found = f"a tensor {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise RequestError(
            f"the metric returned {found} for logits of {len(logits)} rows, expected a tensor of {len(logits)} numbers"
        )
    return out.float()


def _check_token(token: int, logits: Tensor) -> int:
    if not is_whole(token) or not 0 <= token < logits.shape[-1]:
        raise RequestError(f"the metric's token is {token!r:.40}; the vocabulary has 0 to {logits.shape[-1] - 1}")
    return int(token)
