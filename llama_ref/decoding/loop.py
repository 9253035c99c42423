"""The generation loop: prefill a batch of prompts of any lengths, then decode one token per step."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ref.compiled.caches import new_cache
from llama_ref.compiled.cuda_ops import log_normalizer
from llama_ref.compiled.forward import compiled_forward
from llama_ref.decoding.image_prompts import show_images
from llama_ref.decoding.reading import last_states, padded, read
from llama_ref.decoding.row import Row
from llama_ref.errors import LlamaRefError
from llama_ref.formatting import dtype_name
from llama_ref.kv_cache import KVCache
from llama_ref.machine.onednn import onednn_for
from llama_ref.model import Transformer

IGNORED = -100  # the target for which cross_entropy computes no loss
LOGPROB_POSITIONS = 128  # scored at a time in an echoed prompt: logits take 0.5 MB per position


def steps(
    model: Transformer,
    rows: list[Row],
    sample: Callable[[Tensor], Tensor],
    stop_tokens: Collection[int],
    *,
    cache: KVCache | None = None,
    prompt_logprobs: bool = False,
) -> Iterator[None]:
    """Append one token per step to the rows until all have finished.

    `sample` turns logits (B, V) into ids (B,). A `cache` of one row may already hold the beginning of
    that row's prompt. At every yield, and when the iterator is dropped, the cache holds a prefix of
    prompt + generated.
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
        is_ahead = decode_ahead and _may_continue(rows) and cache.longest < cache.max_seq_len
        if is_ahead:  # launch the next step before the host has this one's ids; a stop token wastes it
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
    """Start copying numbers to the host; calling the result waits for them, not for later launches."""
    if not numbers.is_cuda:
        return numbers.tolist
    host = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def fetch() -> list:
        copied.synchronize()
        return host.tolist()

    return fetch


def _may_continue(rows: list[Row]) -> bool:
    """Whether some row needs another token after the next one, unless that is a stop token."""
    return any(not row.finish_reason and len(row.generated) + 1 < row.max_gen_len for row in rows)


def finished(rows: list[Row]) -> bool:
    """Whether all rows have finished."""
    return all(row.finish_reason for row in rows)


@torch.inference_mode()
def prefill(model: Transformer, rows: list[Row], cache: KVCache, prompt_logprobs: bool) -> Tensor:
    """Run the prompts, right-padded to one length: logits (B, V) after the last token of each.

    Padding is written to the cache beyond a row's length: it is never read, and the row's next
    tokens overwrite it.
    """
    ends = [len(row.prompt) for row in rows]
    known = min(cache.longest, min(ends) - 1)  # a cached prompt still needs its last logits
    cache.truncate([known] * len(rows))
    cache.prompt_ends = ends
    show_images(model, rows, cache, known)
    pieces = read(model, cache, padded([row.prompt[known:] for row in rows]), ends)
    if prompt_logprobs:
        pieces = _scored(model, rows, pieces, known)
    states = last_states(pieces, [end - known for end in ends])  # (B, D)
    cache.truncate([end - bool(row.finish_reason) for row, end in zip(rows, ends, strict=True)])
    with onednn_for(states, cache.keys.dtype):
        return model.logits(states)


@torch.inference_mode()
def _decode(model: Transformer, chosen: Tensor, cache: KVCache) -> Tensor:
    """One decode step: ids (B,) -> logits (B, V)."""
    with onednn_for(chosen, cache.keys.dtype):
        return model(chosen[:, None], cache)[:, 0]


def _hold_finished(rows: list[Row], cache: KVCache) -> None:
    """Finished rows keep overwriting their last cache slot; they may have no room for another."""
    if any(row.finish_reason for row in rows):
        cache.truncate([len(row.prompt) + len(row.generated) - bool(row.finish_reason) for row in rows])


def _scored(
    model: Transformer, rows: list[Row], pieces: Iterable[tuple[int, Tensor]], known: int
) -> Iterator[tuple[int, Tensor]]:
    """Pieces of prompts after `known` tokens; appends to every row the log-probabilities that their states give."""
    for begin, hidden in pieces:
        _score_prompts(model, rows, hidden, known + begin)
        yield begin, hidden


def _score_prompts(model: Transformer, rows: list[Row], hidden: Tensor, begin: int) -> None:
    """Append to every row the log-probabilities of the prompt tokens predicted by states (B, T, D) from `begin` on."""
    for row, states in zip(rows, hidden, strict=True):
        if begin == 0:
            row.prompt_logprobs.append(0.0)  # the first token is not predicted
        targets = torch.tensor(row.prompt[begin + 1 : begin + 1 + len(states)], dtype=torch.long, device=hidden.device)
        targets[targets >= model.args.vocab_size] = IGNORED  # an image is not predicted either
        pieces = zip(states[: len(targets)].split(LOGPROB_POSITIONS), targets.split(LOGPROB_POSITIONS), strict=True)
        for some_states, some_targets in pieces:
            with onednn_for(some_targets, model.dtype):
                logits = model.logits(some_states)
            losses = F.cross_entropy(logits, some_targets, reduction="none", ignore_index=IGNORED)
            row.prompt_logprobs.extend((0 - losses).tolist())


def check_not_nan(logprob: float, dtype: torch.dtype, whose: str = "the model") -> None:
    """Raise LlamaRefError for NaN: one NaN among the logits makes every log-probability NaN."""
    if math.isnan(logprob):
        advice = "try dtype=bfloat16 or float32" if dtype == torch.float16 else "check the weights with `llama-ref verify`"
        raise LlamaRefError(f"{whose}'s logits are not numbers (NaN) in {dtype_name(dtype)}: {advice}")
