"""The generation loop: a batch of prompts of any lengths through prefill and decode, one token a step."""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ref.compiled.caches import new_cache
from llama_ref.compiled.cuda_cache import MASKLESS_PREFILL_TOKENS
from llama_ref.compiled.cuda_ops import log_normalizer
from llama_ref.compiled.forward import compiled_forward
from llama_ref.device import fast_for_one_row
from llama_ref.errors import LlamaRefError
from llama_ref.kv_cache import KVCache
from llama_ref.model import Transformer

FinishReason = Literal["stop", "length"]

PREFILL_TOKENS = 1024  # at a time, of all rows together: bounds activations; masks grow with the context alone
LOGPROB_POSITIONS = 128  # logits take 0.5 MB a position: an echoed prompt's are made this many at a time


@dataclass
class Row:
    """One sequence of a batch under way.

    `generated` ends before the stop token, which then stands in `stop_token`. `logprobs` has one entry per generated token, the
    model's own, before temperature and filters. `finish_reason` is None until the end. `drafted` and `accepted` count guessed
    tokens, where there are any (speculative.py).
    """

    prompt: list[int]
    max_gen_len: int
    generated: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    drafted: int = 0
    accepted: int = 0

    def __post_init__(self) -> None:
        if self.max_gen_len == 0:
            self.finish_reason = "length"

    @property
    def total_len(self) -> int:
        """Tokens that this row may come to, prompt included."""
        return len(self.prompt) + self.max_gen_len

    @property
    def passes(self) -> int:
        """Passes of the model that it took so far, the prompt's included: one a token, but for accepted drafts."""
        return len(self.generated) + (self.stop_token is not None) - self.accepted

    def take(self, token: int, logprob: float, stop_tokens: Collection[int]) -> None:
        """Enter the next token, or end if it is a stop token or the last that fits."""
        if token in stop_tokens:
            self.finish_reason, self.stop_token = "stop", token
            return
        self.generated.append(token)
        self.logprobs.append(logprob)
        if len(self.generated) == self.max_gen_len:
            self.finish_reason = "length"


def steps(
    model: Transformer,
    rows: list[Row],
    sample: Callable[[Tensor], Tensor],
    stop_tokens: Collection[int],
    *,
    cache: KVCache | None = None,
    prompt_logprobs: bool = False,
) -> Iterator[None]:
    """Advance the rows by one token each step until all have finished; what was made stands in the rows.

    `sample` turns logits (B, V) into ids (B,). A `cache` of one row may hold the beginning of that row's prompt already;
    whenever the iterator rests, or is dropped, the cache holds a beginning of prompt + generated.
    """
    if finished(rows) and not prompt_logprobs:
        return
    if cache is None:
        cache = new_cache(model, len(rows), max(row.total_len for row in rows))
    logits = prefill(model, rows, cache, prompt_logprobs)
    forward = compiled_forward(model)
    decode_ahead = forward is not None and forward.is_asynchronous
    while not finished(rows):
        chosen = sample(logits)
        logprobs = logits.gather(1, chosen[:, None])[:, 0] - log_normalizer(logits)
        fetch = fetching(torch.stack((chosen.to(logprobs), logprobs)))  # float32 holds every id
        is_ahead = decode_ahead and _may_go_on(rows) and cache.longest < cache.max_seq_len
        if is_ahead:  # the device has the next step before the host has seen this one's ids; a stop token wastes one step
            logits = _decode(model, chosen, cache)
        for row, token, logprob in zip(rows, *fetch(), strict=True):
            if not row.finish_reason:
                check_not_nan(logprob, cache.keys.dtype)
                row.take(int(token), logprob, stop_tokens)
        if is_ahead:
            _hold_finished(rows, cache)
        yield
        if not is_ahead and not finished(rows):
            logits = _decode(model, chosen, cache)
            _hold_finished(rows, cache)


def fetching(numbers: Tensor) -> Callable[[], list]:
    """Begin to bring numbers to the host; calling the result waits for them alone, not for what is launched meanwhile."""
    if not numbers.is_cuda:
        return numbers.tolist
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def fetch() -> list:
        copied.synchronize()
        return host.tolist()

    return fetch


def _may_go_on(rows: list[Row]) -> bool:
    """Whether some row will want another token after the next, unless that is a stop token."""
    return any(not row.finish_reason and len(row.generated) + 1 < row.max_gen_len for row in rows)


def finished(rows: list[Row]) -> bool:
    """Whether no row goes on."""
    return all(row.finish_reason for row in rows)


def prefill_tokens(cache: KVCache) -> int:
    """How many tokens of a prompt, of all rows together, one pass takes."""
    return PREFILL_TOKENS if cache.needs_mask else MASKLESS_PREFILL_TOKENS


@torch.inference_mode()
def prefill(model: Transformer, rows: list[Row], cache: KVCache, prompt_logprobs: bool) -> Tensor:
    """Run the prompts, padded at the right to one length, through the model: logits (B, V) after each one's last token.

    What the pads write into the cache lies beyond a row's length: no token looks there, and its own next tokens overwrite it.
    """
    ends = [len(row.prompt) for row in rows]
    known = min(cache.longest, min(ends) - 1)  # a prompt that is known whole still has to give its last token's logits
    cache.set_lengths([known] * len(rows))
    tokens = torch.zeros(len(rows), max(ends) - known, dtype=torch.long)
    for row, padded in zip(rows, tokens, strict=True):
        padded[: len(row.prompt) - known] = torch.tensor(row.prompt[known:])

    last: list[Tensor] = [tokens] * len(rows)  # each row's final state (D,), filled in below
    begin = known
    for piece in tokens.to(cache.lengths.device).split(max(1, prefill_tokens(cache) // len(rows)), dim=1):
        hidden = model.hidden(piece, cache)  # (B, T, D)
        if prompt_logprobs:
            _score_prompts(model, rows, hidden, begin)
        for i, end in enumerate(ends):
            if begin < end <= begin + piece.shape[1]:
                last[i] = hidden[i, end - 1 - begin].clone()  # a view would keep the whole piece
        begin += piece.shape[1]
    cache.set_lengths([end - bool(row.finish_reason) for row, end in zip(rows, ends, strict=True)])
    return model.logits(torch.stack(last))


@torch.inference_mode()
def _decode(model: Transformer, chosen: Tensor, cache: KVCache) -> Tensor:
    """One token (B,) further: logits (B, V)."""
    with fast_for_one_row(chosen, cache.keys.dtype):
        return model(chosen[:, None], cache)[:, 0]


def _hold_finished(rows: list[Row], cache: KVCache) -> None:
    """Finished rows keep overwriting their last cache slot; they may have no room for another."""
    if any(row.finish_reason for row in rows):
        cache.set_lengths([len(row.prompt) + len(row.generated) - bool(row.finish_reason) for row in rows])


def _score_prompts(model: Transformer, rows: list[Row], hidden: Tensor, begin: int) -> None:
    """Append to every row the log-probabilities of the prompt tokens that these states (B, T, D), from `begin` on, predict."""
    for row, states in zip(rows, hidden, strict=True):
        if begin == 0:
            row.prompt_logprobs.append(0.0)  # nothing predicts the first
        targets = torch.tensor(row.prompt[begin + 1 : begin + 1 + len(states)], dtype=torch.long, device=hidden.device)
        pieces = zip(states[: len(targets)].split(LOGPROB_POSITIONS), targets.split(LOGPROB_POSITIONS), strict=True)
        for some_states, some_targets in pieces:
            losses = F.cross_entropy(model.logits(some_states), some_targets, reduction="none")
            row.prompt_logprobs.extend((-losses).tolist())


def check_not_nan(logprob: float, dtype: torch.dtype, whose: str = "the model") -> None:
    """Raise LlamaRefError for NaN: among the logits it makes every log-probability one, and these come to the host anyway."""
    if math.isnan(logprob):
        advice = "try dtype=bfloat16 or float32" if dtype == torch.float16 else "check the weights with `llama-ref verify`"
        raise LlamaRefError(f"{whose}'s logits are not numbers (NaN) in {str(dtype).removeprefix('torch.')}: {advice}")
