"""Logits to the next token: penalties and biases, temperature, top-k, top-p, min-p, and one draw.

The filters apply in this order, each to what the previous one left (as in Hugging Face's generate; top_p
keeps the same tokens as Meta's). The draw inverts the cumulative distribution at a uniform number drawn
on the CPU, so that a seed gives the same text on every device, as far as rounding does not decide, and in
every process of a parallel job.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypedDict

import torch
from torch import Tensor

from llama_ref.compiled.cuda_ops import likeliest
from llama_ref.errors import RequestError
from llama_ref.numbers import plain_mapping, plain_number

PREFILTER = 1024  # the likeliest tokens, which nearly always cover top_p; if not, all are sorted
# Limit of numeric options; from about 1e38 on, float32 logits overflow to inf and NaN.
LARGEST = 1e30
LARGEST_SEED = (1 << 64) - 1  # limit of PyTorch's generators
COLDEST = 1 / LARGEST  # lower temperatures count as this one, at which only exact ties are random


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token. Raises RequestError on construction for an invalid value.

    temperature: 0 takes the likeliest token. top_p: keep the fewest likeliest tokens whose total
    probability exceeds it. top_k: keep this many (None: all). min_p: keep tokens at least this
    fraction as likely as the likeliest. repetition_penalty: divides positive and multiplies
    negative logits of tokens already in the text (arXiv:1909.05858). logit_bias: added to the
    logits of single tokens; -inf bans a token. seed: for the draws of this call (None: continue the
    model's generator). Numbers may be NumPy numbers or 0-dimensional tensors.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain_number(getattr(self, field.name)))
        object.__setattr__(self, "logit_bias", plain_mapping(self.logit_bias))
        _check("temperature", self.temperature, lambda x: 0 <= x <= LARGEST, f"a number from 0 to {LARGEST:g}")
        _check("top_p", self.top_p, lambda x: 0 < x <= 1, "a number above 0, at most 1 (temperature=0 is greedy)")
        _check("min_p", self.min_p, lambda x: 0 <= x <= 1, "a number between 0 and 1")
        penalty_range = f"a number from {1 / LARGEST:g} to {LARGEST:g}"
        _check("repetition_penalty", self.repetition_penalty, lambda x: 1 / LARGEST <= x <= LARGEST, penalty_range)
        if self.top_k is not None:
            _check("top_k", self.top_k, lambda k: isinstance(k, int) and k >= 1, "a whole number, 1 or more, or None for all")
        if self.seed is not None:
            _check("seed", self.seed, _is_seed, f"a whole number from 0 to {LARGEST_SEED}, or None for a fresh one")
        if not isinstance(self.logit_bias, Mapping | None):
            raise RequestError(f"logit_bias is {self.logit_bias!r}, expected a mapping from token ids to numbers")
        for token, bias in (self.logit_bias or {}).items():
            _check(f"logit_bias[{token}]", bias, _is_bias, f"a number from -{LARGEST:g} to {LARGEST:g}, or -inf")


def _check(name: str, value: object, holds: Callable[[float], bool], expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
        raise RequestError(f"{name} is {value!r}, expected {expected}")


def _is_seed(x: float) -> bool:
    return isinstance(x, int) and 0 <= x <= LARGEST_SEED


def _is_bias(x: float) -> bool:
    return abs(x) <= LARGEST or x == -math.inf


class SamplingOptions(TypedDict, total=False):
    """The fields of SamplingParams that `Llama.generate` and others take by keyword besides temperature and top_p."""

    top_k: int | None
    min_p: float
    repetition_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | None


class StreamOptions(SamplingOptions, total=False):
    """Keywords of `Llama.stream` that `Session.say` hands on."""

    max_gen_len: int | None
    temperature: float
    top_p: float
    stop: str | Sequence[str]
    logprobs: bool


class Sampler:
    """Draws tokens for a batch of rows, and tracks each row's tokens for the repetition penalty.

    `generator` is a CPU generator; one number is drawn from it per row and step. `prompts` holds each
    row's ids, which the repetition penalty counts too. `agree` maps chosen ids (B,) to those on which all
    processes of a parallel job agree. Raises RequestError for a logit_bias outside the vocabulary.
    """

    def __init__(
        self,
        params: SamplingParams,
        generator: torch.Generator,
        prompts: list[list[int]],
        vocab_size: int,
        device: torch.device | str = "cpu",
        agree: Callable[[Tensor], Tensor] | None = None,
    ):
        self.params = params
        self.generator = generator
        self._agree = agree
        self._bias = _bias(params.logit_bias, vocab_size, device) if params.logit_bias else None  # (V,)
        self._seen = _seen(prompts, vocab_size, device) if params.repetition_penalty != 1.0 else None  # (B, V)

    def __call__(self, logits: Tensor) -> Tensor:
        """float32 logits (B, V) -> chosen ids (B,)."""
        logits = self._adjust(logits)
        if self.params.temperature == 0:
            return self._remember(likeliest(logits))
        return self._remember(sample(logits, self.params, self._uniform(len(logits), 1)))

    def fork(self) -> "Sampler":
        """A copy with the same generator: tokens that the copy chooses are not tracked by this one."""
        other = copy.copy(self)
        other._seen = None if self._seen is None else self._seen.clone()
        return other

    def guess(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Chosen ids (B,), as by a call, and the distribution they were drawn from: float64 (B, V), None if greedy."""
        if self.params.temperature == 0:
            return self(logits), None
        probs = distribution(self._adjust(logits), self.params)
        return self._remember(draw(probs, self._uniform(len(logits), 1))), probs

    def accept_or_resample(self, logits: Tensor, guessed: Tensor, drawn_from: Tensor) -> Tensor:
        """Chosen ids (B,): guesses (B,) drawn from q = `drawn_from` (B, V) if accepted, else resampled ones.

        With p the distribution of a call, a guess x is accepted with probability min(1, p(x) / q(x));
        otherwise a token is drawn from max(p - q, 0), so that every id has probability p overall
        (arXiv:2211.17192, appendix A.1). A rejected guess is never drawn again. Two numbers are drawn from
        the generator per row.
        """
        p = distribution(self._adjust(logits), self.params)
        uniform = self._uniform(len(logits), 2).to(p)
        p_guess, q_guess = (probs.gather(1, guessed[:, None])[:, 0] for probs in (p, drawn_from))
        more = (p - drawn_from).clamp(min=0)
        more = torch.where(more.any(-1, keepdim=True), more, p)  # all zero when p = q up to rounding
        return self._remember(torch.where(uniform[:, 0] * q_guess < p_guess, guessed, draw(more, uniform[:, 1:])))

    def _uniform(self, rows: int, n: int) -> Tensor:
        return torch.rand(rows, n, generator=self.generator, dtype=torch.float64, device="cpu")

    def _remember(self, chosen: Tensor) -> Tensor:
        if self._agree is not None:
            chosen = self._agree(chosen)
        if self._seen is not None:
            self._seen.scatter_(1, chosen[:, None], True)
        return chosen

    def _adjust(self, logits: Tensor) -> Tensor:
        if self._seen is not None:
            penalty = self.params.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen, penalised, logits)
        if self._bias is not None:
            logits = logits + self._bias
        return logits


def sample(logits: Tensor, params: SamplingParams, uniform: Tensor) -> Tensor:
    """Filter and draw: logits (B, V), uniform (B, 1) in [0, 1) -> ids (B,). The temperature must be above 0."""
    probs, ids = candidates(logits, params)
    picked = draw(probs, uniform)
    return picked if ids is None else ids.gather(1, picked[:, None])[:, 0]


def distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution of `sample`: logits (B, V) -> probabilities (B, V), float64 if the device has it."""
    probs, ids = candidates(logits, params)
    if ids is not None:
        probs = torch.zeros_like(logits).scatter(1, ids, probs)
    probs = probs.to(_widest(probs.device))
    return probs / probs.sum(-1, keepdim=True)


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw indices (B,) with unnormalised probabilities (B, N), by uniform (B, 1) in [0, 1)."""
    cumulative = probs.to(_widest(probs.device)).cumsum(-1)  # (B, N)
    target = uniform.to(device=cumulative.device, dtype=cumulative.dtype, non_blocking=True) * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, target, right=True)  # the first whose cumulative mass exceeds the target
    return torch.minimum(picked, _last_possible(probs))[:, 0]  # uniform may round up to 1 in float32


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """The filtered tokens: unnormalised probabilities (B, N) and their ids (B, N), None for all V in order.

    Filtered out tokens have probability 0. Only as much of the vocabulary is sorted as the filters need.
    """
    logits = logits - logits.amax(-1, keepdim=True)  # so that dividing by a small temperature cannot overflow
    probs = torch.softmax(logits / max(params.temperature, COLDEST), dim=-1)
    ids = None
    total: float | Tensor = 1.0  # the probability mass of which top_p is a fraction
    if params.top_k is not None and params.top_k < probs.shape[-1]:
        probs, ids = probs.topk(params.top_k)
        total = probs.sum(-1, keepdim=True)
    if params.top_p < 1:
        if ids is None:
            probs, ids = _likeliest(probs, params.top_p)
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(before > params.top_p * total, 0)
    if params.min_p > 0:
        probs = probs.masked_fill(probs < params.min_p * probs.amax(-1, keepdim=True), 0)
    return probs, ids


def _likeliest(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens in falling order, enough of them to hold `top_p`: all if the first thousand do not.

    The prefilter is for the CPU, where sorting 128,256 numbers is slow; on a GPU, the check would make
    the host wait for the device.
    """
    if probs.device.type == "cpu" and probs.shape[-1] > PREFILTER:
        top, ids = probs.topk(PREFILTER)
        if bool((top.sum(-1) > top_p).all()):
            return top, ids
    return probs.sort(dim=-1, descending=True)


def _last_possible(probs: Tensor) -> Tensor:
    """Index (B, 1) of the last candidate with a probability above 0."""
    places = torch.arange(probs.shape[-1], device=probs.device)
    return torch.where(probs > 0, places, 0).amax(-1, keepdim=True)


def _widest(device: torch.device) -> torch.dtype:
    """float64, which keeps small probabilities exact, if the device has it, else float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def _bias(bias: Mapping[int, float], vocab_size: int, device: torch.device | str) -> Tensor:
    """The dense bias: float32 (V,)."""
    for token in bias:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise RequestError(f"logit_bias names token {token!r}; the vocabulary has 0 to {vocab_size - 1}")
    dense = [bias.get(token, 0.0) for token in range(vocab_size)]
    if max(dense) == -math.inf:
        raise RequestError("logit_bias bans every token")
    return torch.tensor(dense, dtype=torch.float32, device=device)


def _seen(prompts: list[list[int]], vocab_size: int, device: torch.device | str) -> Tensor:
    """Which tokens each prompt contains: bool (B, V)."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device="cpu")
    for row, prompt in zip(seen, prompts, strict=True):
        row.scatter_(0, torch.tensor(prompt, dtype=torch.long, device="cpu"), True)
    return seen.to(device)
