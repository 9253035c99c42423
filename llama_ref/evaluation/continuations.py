"""Score continuations of contexts, as multiple-choice tasks need.

The choices of one question share its context, and the questions of one subject share their
examples. A shared prefix is read once; then the rest of each context; then each continuation
without its last token, because no logits are needed after that.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from llama_ref.decoding.reading import last_states, padded, read
from llama_ref.evaluation.prefix import PrefixCache, repeated, shared_length
from llama_ref.evaluation.scoring import Score, score_states, score_tokens
from llama_ref.kv_cache import KVCache
from llama_ref.model import Transformer

Ids = tuple[int, ...]

SHORTEST_SHARED = 32  # tokens: a shorter prefix saves less than the smaller batches cost


def score_continuations(
    model: Transformer, requests: Sequence[tuple[Sequence[int], Sequence[int]]], batch: int
) -> Iterator[tuple[int, Score]]:
    """Score each (context, continuation); yields (request number, score) as they are computed.

    Contexts and continuations have at least one token each. `batch` contexts are read at once, then
    all their continuations. The scores equal those of one pass over context + continuation. Raises
    LlamaRefError for NaN logits.
    """
    asked: dict[Ids, list[int]] = {}
    for number, (context, _) in enumerate(requests):
        asked.setdefault(tuple(context), []).append(number)
    prefix = PrefixCache(model)
    for beginning, contexts in clusters(asked):
        for start in range(0, len(contexts), batch):
            some = contexts[start : start + batch]
            numbers = [asked[context] for context in some]
            continuations = [[requests[number][1] for number in each] for each in numbers]
            scores = _score_batch(model, prefix.read(beginning), some, continuations)
            yield from zip((number for each in numbers for number in each), scores, strict=True)


@torch.inference_mode()
def _score_batch(
    model: Transformer, prefix: KVCache | None, contexts: Sequence[Ids], continuations: Sequence[Sequence[Sequence[int]]]
) -> list[Score]:
    """Scores of each context's continuations, in order.

    All contexts begin with the cached `prefix`.
    """
    n_known = 0 if prefix is None else prefix.longest
    rests = padded([context[n_known:] for context in contexts])
    cache = repeated(model, prefix, [0] * len(contexts), n_known + rests.shape[1])
    ends = [len(context) for context in contexts]
    last = last_states(read(model, cache, rests, ends), [end - n_known for end in ends])  # (B, D)
    cache.truncate(ends)

    owners = [row for row, own in enumerate(continuations) for _ in own]
    flat = [ids for own in continuations for ids in own]
    logprobs, are_greedy = score_tokens(model, last[owners], [ids[0] for ids in flat])
    longer = [number for number, ids in enumerate(flat) if len(ids) > 1]
    if longer:
        inputs = padded([flat[number][:-1] for number in longer])
        wide = repeated(model, cache, [owners[number] for number in longer], cache.longest + inputs.shape[1])
        wide_ends = [ends[owners[number]] + len(flat[number]) - 1 for number in longer]
        rest = score_states(model, read(model, wide, inputs, wide_ends), [(0, flat[number][1:]) for number in longer])
        for number, score in zip(longer, rest, strict=True):
            logprobs[number] += score.logprob
            are_greedy[number] &= score.is_greedy
    return [Score(*each) for each in zip(logprobs, are_greedy, strict=True)]


def clusters(contexts: Iterable[Ids]) -> list[tuple[Ids, list[Ids]]]:
    """Group contexts by a shared prefix of at least half of each; all others get an empty prefix.

    Within a cluster the longest come first: batches of similar lengths need the least padding. A
    shared prefix leaves at least one token of each context.
    """
    found: list[Cluster] = []
    for context in sorted(contexts):
        if not (found and found[-1].takes(context)):
            found.append(Cluster(len(context) - 1, len(context), [context]))
    alone = [each.contexts[0] for each in found if len(each.contexts) == 1]
    shared = [(each.contexts[0][: each.shared], each.contexts) for each in found if len(each.contexts) > 1]
    return [(beginning, sorted(own, key=len, reverse=True)) for beginning, own in [((), alone), *shared] if own]


@dataclass
class Cluster:
    """Sorted contexts, the length of their `shared` prefix, and the length of the `longest`."""

    shared: int
    longest: int
    contexts: list[Ids]

    def takes(self, context: Ids) -> bool:
        """Add the next context if it shares a long enough prefix; returns whether it was added."""
        shared = min(self.shared, shared_length(self.contexts[-1], context), len(context) - 1)
        longest = max(self.longest, len(context))
        if shared < SHORTEST_SHARED or 2 * shared < longest:
            return False
        self.shared, self.longest = shared, longest
        self.contexts.append(context)
        return True
