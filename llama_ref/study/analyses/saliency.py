"""Saliency: how much each token of a prompt adds to a prediction, by gradients of its embeddings.

Integrated gradients move the tokens' embeddings from a baseline to their actual values, and divide the
change of the prediction among the tokens: the shares add up to it, up to the error of summing few steps.
Source: Sundararajan et al., "Axiomatic Attribution for Deep Networks", arXiv:1703.01365.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.numbers import is_whole
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.study.analyses.logit_lens import LOGITS_AT_A_TIME
from llama_ref.study.directions.extraction import check_direction
from llama_ref.study.inputs import check_index, check_token, one_row
from llama_ref.study.passes.gradients import gradients
from llama_ref.study.passes.hooks import check_model
from llama_ref.study.passes.layer_window import embedded, layer_window
from llama_ref.study.passes.pass_size import tokens_that_fit
from llama_ref.study.texts import Text
from llama_ref.study.trace import trace

Method = Literal["integrated", "gradient×input", "gradient"]
Measure = Literal["logit", "log_probability"]

METHODS: tuple[Method, ...] = ("integrated", "gradient×input", "gradient")
MEASURES: tuple[Measure, ...] = ("logit", "log_probability")
EMBEDDED, EMBEDDED_ROWS = "layers.0.residual_pre", 4096


@dataclass(frozen=True)
class Saliency:
    """Shares of T tokens in the prediction of `answer` after them: float32 (T,), on the CPU.

    `value` is the measure `of` each token of the answer, averaged over them: its logit, that logit minus
    the `other` token's, or its log-probability in nats. Shares are in the same unit; with method
    "gradient" they are the length of the gradient, per unit of the embedding. `baseline_value` is the
    measure with the tokens at `positions` at the baseline, only for integrated gradients.
    """

    tokens: list[int]
    answer: list[int]
    other: int | None
    of: Measure
    method: Method
    positions: list[int]
    shares: Tensor
    value: float
    baseline_value: float | None = None

    @property
    def total(self) -> float:
        """The sum of the shares."""
        return float(self.shares.double().sum())

    @property
    def missing(self) -> float | None:
        """The change from the baseline to the text minus the shares' sum; None without a baseline.

        With more steps it approaches 0 (completeness).
        """
        return None if self.baseline_value is None else self.value - self.baseline_value - self.total


@torch.no_grad()
def saliency(
    model: Transformer,
    tokens: Text,
    target: int | Sequence[int],
    other: int | None = None,
    *,
    method: Method = "integrated",
    of: Measure | None = None,
    position: int = -1,
    positions: Sequence[int] | None = None,
    steps: int = 32,
    baseline: str | int | Tensor = "mean",
    progress: Progress | None = None,
) -> Saliency:
    """Divide a prediction among the tokens before it.

    `target` is a token predicted after `position`, or the ids of an answer after the whole prompt: then
    the mean over its tokens, whose embeddings do not move. `of`: "logit" (default for a token) or
    "log_probability" (default for an answer); with `other`, the difference of the two logits. `method`:
    "integrated"; "gradient×input", the embedding times its gradient; "gradient", the gradient's length.
    `positions` are the tokens that get a share (default: all); the others do not move.

    `baseline`: "mean" of all embeddings, "zero", the id of a token, or an embedding (D,). The first norm
    amplifies embeddings near zero, so a zero baseline needs many steps. `steps` gradients are averaged
    by Gauss-Legendre quadrature. `progress` is called with the gradients done and their number. Memory:
    one backward pass with as many steps as fit. Images have no embeddings in the text, so a text with an
    image is rejected. Quantized models: see passes/gradients.py. Raises RequestError.
    """
    check_model(model)
    row = one_row(model, tokens)[0]
    answer = _check_answer(model, target)
    if not isinstance(target, Sequence | Tensor):
        row = row[: 1 + check_index("position", position, len(row))]
    elif position != -1:
        raise RequestError(f"position is {position!r:.40}, but an answer's tokens come after the whole prompt: leave it out")
    other = None if other is None else check_token(model, other)
    if other is not None and len(answer) > 1:
        raise RequestError("other is given, but the answer has several tokens: compare single tokens")
    own_method, measure = _check_method(method), _check_measure(of, len(answer), other)
    moved = _check_positions(positions, len(row))
    rule = _rule(steps) if own_method == "integrated" else [(1.0, 1.0)]
    path = _Path.for_answer(
        model, row, answer, moved, _embedded_baseline(model, baseline) if own_method == "integrated" else None
    )
    metric = _Metric(model, len(row) - 1, answer, other, measure)
    gradient = path.mean_gradient(metric, rule, progress)  # (T, D)
    shares = gradient.norm(dim=-1) if own_method == "gradient" else (path.change * gradient).sum(-1)
    held = torch.ones(len(row), dtype=torch.bool, device=shares.device)
    held[moved] = False
    return Saliency(
        tokens=row.tolist(),
        answer=answer,
        other=other,
        of=measure,
        method=own_method,
        positions=moved,
        shares=shares.masked_fill(held, 0).cpu(),
        value=path.value(metric, 1.0),
        baseline_value=path.value(metric, 0.0) if own_method == "integrated" else None,
    )


@dataclass(frozen=True)
class _Metric:
    """Computes the measure from the final norm (n, L, D) of a text of L tokens: (n,)."""

    model: Transformer
    begin: int  # the prompt's last token
    answer: list[int]
    other: int | None
    of: Measure

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.model.logits(hidden[:, self.begin :])  # (n, A, V)
        scores = logits if self.of == "logit" else logits.log_softmax(-1)
        ids = torch.tensor(self.answer, device=logits.device).expand(len(logits), -1)[..., None]
        own = scores.gather(-1, ids)[..., 0]  # (n, A)
        return (own if self.other is None else own - scores[..., self.other]).mean(-1)


@dataclass(frozen=True)
class _Path:
    """A text's embeddings, moved from a baseline (share 0) to their actual values (share 1).

    `ids` (L,) are the prompt's and the answer's without its last token; `ends` (L, D) in the model's
    dtype; `change` float32 (T, D), 0 at tokens that do not move.
    """

    model: Transformer
    ids: Tensor
    ends: tuple[Tensor, Tensor]
    change: Tensor
    rows_at_once: int

    @classmethod
    def for_answer(
        cls, model: Transformer, row: Tensor, answer: list[int], moved: list[int], baseline: Tensor | None
    ) -> "_Path":
        """Make the path; `baseline` (D,) is for the tokens that move. None: zero, for methods with one gradient."""
        ids = torch.cat((row, torch.tensor(answer[:-1], dtype=row.dtype, device=row.device)))
        (end,) = embedded(model, [ids])
        begin = end.clone()
        begin[moved] = 0 if baseline is None else baseline.to(end)
        change = (end.float() - begin.float())[: len(row)]
        tokens = tokens_that_fit(model, "residual_pre", len(ids), gradients=True)
        logits = LOGITS_AT_A_TIME // (len(answer) * model.args.vocab_size)
        return cls(model, ids, (begin, end), change, max(1, min(tokens // len(ids), logits)))

    def at(self, shares: Sequence[float]) -> Tensor:
        """The embeddings at some points of the path: (n, L, D)."""
        begin, end = self.ends
        along = torch.tensor(shares, dtype=torch.float32, device=end.device)[:, None, None]
        return torch.where(along == 1, end, (begin.float() + along * (end.float() - begin.float())).to(end.dtype))

    def value(self, metric: _Metric, share: float) -> float:
        """The measure at one point of the path."""
        with layer_window(self.model, range(self.model.args.n_layers), self.at([share])):
            return float(metric(trace(self.model, self.ids, ["norm"])["norm"])[0])

    def mean_gradient(self, metric: _Metric, rule: Sequence[tuple[float, float]], progress: Progress | None) -> Tensor:
        """The weighted mean gradient by the prompt's embeddings; `rule` has (share, weight): float32 (T, D)."""
        total = torch.zeros_like(self.change)
        counter = ProgressCounter(len(rule), progress)
        for some in _chunks(rule, self.rows_at_once):
            shares, weights = zip(*some, strict=True)
            texts = self.ids.expand(len(some), -1)
            with layer_window(self.model, range(self.model.args.n_layers), self.at(shares)):
                traced = trace(self.model, texts, [EMBEDDED, "norm"], requires_grad=True)
            with gradients(self.model):
                (found,) = torch.autograd.grad(metric(traced["norm"]).sum(), traced[EMBEDDED])
            total += torch.einsum("n,ntd->td", total.new_tensor(weights), found[:, : len(total)].float())
            counter.advance(len(some))
        return total


def _chunks(rule: Sequence[tuple[float, float]], n: int) -> Iterator[Sequence[tuple[float, float]]]:
    return (rule[start : start + n] for start in range(0, len(rule), n))


def _rule(steps: int) -> list[tuple[float, float]]:
    """Gauss-Legendre points from 0 to 1 and their weights."""
    points, weights = np.polynomial.legendre.leggauss(check_steps(steps))
    return [(float(1 + x) / 2, float(w) / 2) for x, w in zip(points, weights, strict=True)]


def _embedded_baseline(model: Transformer, baseline: str | int | Tensor) -> Tensor:
    """The embedding (D,) at which tokens start. Raises RequestError."""
    if isinstance(baseline, Tensor):
        return check_direction(baseline, model.args.dim).to(model.device)
    if baseline == "zero":
        return torch.zeros(model.args.dim, device=model.device)
    if baseline == "mean":
        return embedding_mean(model)
    if isinstance(baseline, str):
        raise RequestError(f"baseline is {baseline!r:.40}, expected mean, zero, the id of a token, or an embedding (D,)")
    return model.embed(torch.tensor([[check_token(model, baseline)]], device=model.device))[0, 0].float()


def embedding_mean(model: Transformer) -> Tensor:
    """The mean of all tokens' embeddings, quantized or not: float32 (D,)."""
    total = torch.zeros(model.args.dim, dtype=torch.float64, device=model.device)
    for ids in torch.arange(model.args.vocab_size, device=model.device).split(EMBEDDED_ROWS):
        total += model.embed(ids).double().sum(0)
    return (total / model.args.vocab_size).float()


# ---- checks


def _check_answer(model: Transformer, target: int | Sequence[int]) -> list[int]:
    if isinstance(target, str) or not isinstance(target, Sequence | Tensor):
        check_model(model)
        return [check_token(model, target)]
    ids = target.tolist() if isinstance(target, Tensor) else list(target)
    if not isinstance(ids, list) or not ids:
        raise RequestError(f"target is {target!r:.60}, expected a token's id, or a list of an answer's ids")
    return [check_token(model, token) for token in ids]


def _check_method(method: str) -> Method:
    for known in METHODS:
        if method == known:
            return known
    raise RequestError(f"method is {method!r:.40}, expected {', '.join(METHODS)}")


def check_steps(steps: int) -> int:
    """Return the number of steps. Raises RequestError unless it is from 1 to 10,000."""
    if not is_whole(steps) or not 1 <= steps <= 10_000:
        raise RequestError(f"steps is {steps!r:.40}, expected a whole number from 1 to 10,000")
    return int(steps)


def _check_measure(of: str | None, n_tokens: int, other: int | None) -> Measure:
    if of is None:
        return "logit" if n_tokens == 1 else "log_probability"
    if other is not None and of == "log_probability":
        raise RequestError('of is log_probability, but other is given: two tokens are compared by logits; use of="logit"')
    for known in MEASURES:
        if of == known:
            return known
    raise RequestError(f"of is {of!r:.40}, expected {' or '.join(MEASURES)}")


def _check_positions(positions: Sequence[int] | None, n_tokens: int) -> list[int]:
    if positions is None:
        return list(range(n_tokens))
    if isinstance(positions, str) or not isinstance(positions, Sequence) or not positions:
        raise RequestError(f"positions is {positions!r:.60}, expected a list of them, or None for all")
    return sorted({check_index("position", position, n_tokens) for position in positions})
