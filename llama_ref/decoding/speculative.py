"""Speculative decoding: guess several tokens, verify them in one forward pass, keep the right ones.

A pass over a few tokens reads the weights once, as a pass over one token does, and costs little more.
Guesses come from the text itself (prompt_lookup.py) or from a smaller model (draft_model.py). The
output is what it would be without them: greedy tokens are the same, and so are tokens sampled with a
seed when prompt lookup guesses; a draft model's guesses are accepted or resampled so that every token
keeps its distribution (arXiv:2211.17192, arXiv:2302.01318).
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ref.compiled.caches import new_cache
from llama_ref.decoding.drafting import Draft, Drafter, Speculation
from llama_ref.decoding.loop import check_not_nan, finished, prefill
from llama_ref.decoding.row import Row
from llama_ref.kv_cache import KVCache
from llama_ref.machine.onednn import onednn_for
from llama_ref.model import Transformer
from llama_ref.sampling import Sampler


def speculative_steps(
    model: Transformer,
    rows: list[Row],
    samplers: Sequence[Sampler],
    stop_tokens: Collection[int],
    speculation: Speculation,
    *,
    cache: KVCache | None = None,
    prompt_logprobs: bool = False,
) -> Iterator[None]:
    """As `loop.steps`, token by token, in fewer forward passes; counts `drafted` and `accepted` in the rows.

    One sampler per row, because rows advance at different rates.
    """
    if finished(rows) and not prompt_logprobs:
        return
    if cache is None:
        cache = new_cache(model, len(rows), max(row.total_len for row in rows))
    with speculation.drafting(rows) as drafters:
        lanes = [_Lane(*each) for each in zip(rows, samplers, drafters, strict=True)]
        logits = prefill(model, rows, cache, prompt_logprobs)[:, None]  # (B, 1, V): as after a pass without guesses
        while not finished(rows):
            yield from _take(lanes, logits, stop_tokens, cache)
            if not finished(rows):
                logits = _pass(model, lanes, stop_tokens, cache)


@dataclass
class _Lane:
    """A row with its sampler, its drafter and its current draft."""

    row: Row
    sampler: Sampler
    drafter: Drafter
    draft: Draft = field(default_factory=Draft)

    def guess(self, room: int, stop_tokens: Collection[int]) -> None:
        """Make a draft that leaves room for the token after it and ends with the first stop token."""
        at_most = min(room, self.row.max_gen_len - len(self.row.generated)) - 1
        draft = Draft() if self.row.finish_reason or at_most < 1 else self.drafter.draft(self.row, at_most, self.sampler)
        stop = next((i for i, token in enumerate(draft.tokens) if token in stop_tokens), len(draft.tokens))
        self.draft = Draft(draft.tokens[: stop + 1], draft.drawn_from[: stop + 1])
        self.row.drafted += len(self.draft.tokens)

    def take(self, i: int, logits: Tensor, stop_tokens: Collection[int], dtype: torch.dtype) -> bool:
        """Choose the next token from logits (1, V): True if it is the draft's i-th and more may follow."""
        guessed = self.draft.tokens[i] if i < len(self.draft.tokens) else None
        if self.draft.drawn_from and guessed is not None:
            guesses = torch.tensor([guessed], device=logits.device)
            chosen = self.sampler.accept_or_resample(logits, guesses, self.draft.drawn_from[i][None])
        else:
            # A deterministic guess is accepted with probability p, and its replacement follows p
            # too: so draw from p and compare.
            chosen = self.sampler(logits)
        logprob = -F.cross_entropy(logits, chosen).item()
        check_not_nan(logprob, dtype)
        token = int(chosen)
        self.row.take(token, logprob, stop_tokens)
        self.row.accepted += token == guessed
        return token == guessed and not self.row.finish_reason


def _take(lanes: list[_Lane], logits: Tensor, stop_tokens: Collection[int], cache: KVCache) -> Iterator[None]:
    """Choose tokens from a pass's logits (B, T, V), one per step: each row's accepted guesses and one more.

    At every yield the cache is truncated to what has been taken.
    """
    live = [not lane.row.finish_reason for lane in lanes]
    accepting = [(lane, own) for lane, own in zip(lanes, logits, strict=True) if not lane.row.finish_reason]
    for i in range(logits.shape[1]):
        accepting = [
            (lane, own)
            for lane, own in accepting
            # A row may have finished at a stop string since the last yield.
            if not lane.row.finish_reason and lane.take(i, own[i : i + 1], stop_tokens, cache.keys.dtype)
        ]
        _truncate(cache, lanes, live)
        yield
        if not accepting:
            return


@torch.inference_mode()
def _pass(model: Transformer, lanes: list[_Lane], stop_tokens: Collection[int], cache: KVCache) -> Tensor:
    """Draft for every row and run the drafts: logits (B, T, V) after each row's last token and its guesses.

    Shorter drafts are padded. Padding and wrong guesses are written to the cache beyond the length
    to which it is truncated.
    """
    _truncate(cache, lanes, [not lane.row.finish_reason for lane in lanes])
    for lane in lanes:
        lane.guess(cache.max_seq_len - cache.longest, stop_tokens)
    width = 1 + max(len(lane.draft.tokens) for lane in lanes)
    tokens = torch.zeros(len(lanes), width, dtype=torch.long, device="cpu")
    ends = []
    for lane, padded in zip(lanes, tokens, strict=True):
        new = [*lane.row.generated[-1:], *lane.draft.tokens]
        padded[: len(new)] = torch.tensor(new, device="cpu")
        ends.append(0 if lane.row.finish_reason else len(lane.row.prompt) + len(lane.row.generated) + len(lane.draft.tokens))
    tokens = tokens.to(cache.lengths.device)
    with onednn_for(tokens, cache.keys.dtype), cache.padding_from(ends):
        return model(tokens, cache)


def _truncate(cache: KVCache, lanes: list[_Lane], live: list[bool]) -> None:
    """Truncate the cache to the tokens that were taken and run; to nothing for finished rows."""
    rows = [lane.row for lane in lanes]
    # The last token taken has not been run yet.
    lengths = [len(row.prompt) + len(row.generated) - (row.stop_token is None) for row in rows]
    cache.truncate([length if is_live else 0 for length, is_live in zip(lengths, live, strict=True)])
