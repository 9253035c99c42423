"""Scores of continuations equal those of one pass, however the requests are grouped."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_ref.evaluation.continuations import SHORTEST_SHARED, clusters, score_continuations
from llama_ref.evaluation.prefix import PrefixCache
from llama_ref.evaluation.scoring import score_rows
from llama_ref.model import Transformer
from llama_ref.study.passes.hooks import attached

SHARED = tuple(range(60, 60 + SHORTEST_SHARED + 8))
REQUESTS = [
    *(((65, 66, 67), (c, 70, 71)) for c in (72, 73, 74)),  # a question's choices
    ((65, 66), (67,)),
    ((90,), tuple(range(80, 99))),
    *(((*SHARED, i, 65), (i + 1, 66)) for i in range(70, 75)),  # questions after the same examples
    ((*SHARED, 70, 65), (90,)),
    (SHARED, (1, 2)),  # a context that is a prefix of others
    ((65, 66, 67), (72, 70, 71)),  # asked twice
]


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_scores_are_those_of_one_pass_each(peaked, batch):
    found = dict(score_continuations(peaked.model, REQUESTS, batch))
    assert sorted(found) == list(range(len(REQUESTS)))
    for number, (context, continuation) in enumerate(REQUESTS):
        (alone,) = score_rows(peaked.model, [((*context, *continuation), len(context))])
        assert found[number].logprob == pytest.approx(alone.logprob, rel=1e-5), number
        assert found[number].is_greedy == alone.is_greedy


def test_edits_see_no_padding(peaked):
    """A pass over padded rows marks their padding, so that an edit of a text's last token finds it."""
    seen = []

    class Watcher:
        edits, in_path = False, False

        def wants(self, name):
            return False

        def begin(self, run):
            seen.append(run.tokens.tolist())

    with attached(peaked.model, Watcher()):
        score_rows(peaked.model, [((5, 6, 7, 8), 1), ((9, 5), 1)])
        dict(score_continuations(peaked.model, [((5, 6, 7), (8, 9)), ((9,), (5, 6, 7))], 2))
    assert seen == [[[5, 6, 7], [9, -1, -1]], [[5, 6, 7], [9, -1, -1]], [[8, -1], [5, 6]]]


def test_greedy_is_what_the_model_would_say(peaked):
    (said,), _ = peaked.generate([[65, 66, 67]], max_gen_len=4, temperature=0)
    other = [*said[:-1], said[-1] ^ 1]
    found = dict(score_continuations(peaked.model, [((65, 66, 67), said), ((65, 66, 67), other)], 8))
    assert (found[0].is_greedy, found[1].is_greedy) == (True, False)


def test_shared_tokens_are_read_once(peaked, monkeypatch):
    """Count the tokens read for contexts and prefixes.

    The last token of a continuation is never read.
    """
    n_read, hidden = [], Transformer.hidden

    def counting(self: Transformer, tokens: torch.Tensor, cache: object) -> torch.Tensor:
        n_read.append(tokens.numel())
        return hidden(self, tokens, cache)

    monkeypatch.setattr(Transformer, "hidden", counting)
    questions = [((*SHARED, i, 65), (choice,)) for i in range(70, 75) for choice in (1, 2, 3, 4)]
    list(score_continuations(peaked.model, questions, 8))
    assert sum(n_read) == len(SHARED) + 5 * 2


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), max_size=12))
def test_clusters_hold_every_context_once_and_begin_alike(short_beginnings, contexts):
    given_contexts = {tuple(context) for context in contexts}
    found = clusters(given_contexts)
    assert sorted(each for _, own in found for each in own) == sorted(given_contexts)
    for beginning, own in found:
        assert all(each[: len(beginning)] == beginning and len(each) > len(beginning) for each in own)
        assert not beginning or all(2 * len(beginning) >= len(each) for each in own)
        assert [len(each) for each in own] == sorted(map(len, own), reverse=True)


@pytest.fixture(scope="module")
def short_beginnings():
    patch = pytest.MonkeyPatch()
    patch.setattr("llama_ref.evaluation.continuations.SHORTEST_SHARED", 2)
    yield
    patch.undo()


def test_a_beginning_is_kept_as_far_as_the_next_one_has_it(peaked):
    prefix = PrefixCache(peaked.model)
    assert prefix.read(()) is None
    for ids in [(1, 2, 3, 4), (1, 2, 9), (1, 2, 9), (1, 2), (7, *range(20))]:
        cache = prefix.read(ids)
        fresh = PrefixCache(peaked.model).read(ids)
        assert cache.longest == fresh.longest == len(ids)
        torch.testing.assert_close(cache.keys[:, :, :, : len(ids)], fresh.keys[:, :, :, : len(ids)])
