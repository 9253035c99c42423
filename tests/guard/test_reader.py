"""Tokens and probabilities that the reader derives from hand-made logits."""

import math
from functools import partial

import pytest
import torch

from guard_folders import SAFE, UNSAFE
from llama_ref.errors import RequestError
from llama_ref.guard.reader import VerdictReader, word_id
from llama_ref.tokenizer import Tokenizer

EOT, NEWLINES, HELLO = 128009, 271, 9906
about = partial(pytest.approx, rel=1e-3)  # float32 sums of 128,256 small terms


def logits(*rows: dict[int, float]) -> torch.Tensor:
    """Logits with the given probabilities by token.

    The rest is spread evenly over all other tokens.
    """
    out = torch.empty(len(rows), 128256)
    for row, given in zip(out, rows, strict=True):
        row.fill_(math.log((1 - sum(given.values())) / (128256 - len(given))))
        for token, probability in given.items():
            row[token] = math.log(probability)
    return out


def read(tokenizer: Tokenizer, threshold: float, *rows: dict[int, float]):
    reader = VerdictReader(tokenizer, threshold, len(rows))
    return reader, reader(logits(*rows)).tolist()


@pytest.mark.parametrize(
    ("unsafe", "safe", "threshold", "chosen"),
    [(0.6, 0.3, 0.5, UNSAFE), (0.3, 0.6, 0.5, EOT), (0.3, 0.6, 0.25, UNSAFE), (0.6, 0.3, 0.75, EOT), (0.45, 0.4, 0.5, UNSAFE)],
)
def test_the_threshold_decides_between_the_words(tokenizer, unsafe, safe, threshold, chosen):
    reader, ids = read(tokenizer, threshold, {UNSAFE: unsafe, SAFE: safe})
    [found] = reader.probabilities
    assert ids == [chosen] and reader.is_safe == [chosen == EOT]
    assert found.unsafe == about(unsafe) and found.safe == about(safe)
    assert found.ratio == about(unsafe / (safe + unsafe))


def test_a_verdict_after_white_space_is_read_where_it_stands(tokenizer):
    reader = VerdictReader(tokenizer, 0.5, 2)
    assert reader(logits({NEWLINES: 0.9, UNSAFE: 0.01}, {SAFE: 0.9})).tolist() == [NEWLINES, EOT]
    assert reader(logits({UNSAFE: 0.8}, {UNSAFE: 0.9})).tolist()[0] == UNSAFE
    assert reader.probabilities[0].unsafe == about(0.8)
    assert reader.probabilities[1].safe == about(0.9)
    assert reader(logits({198: 0.9}, {50: 0.9})).tolist() == [198, 50]


def test_another_answer_is_taken_as_it_comes(tokenizer):
    reader, ids = read(tokenizer, 0.0, {HELLO: 0.9, UNSAFE: 0.05})
    assert ids == [HELLO] and reader.is_safe == [False]
    assert reader.probabilities[0].unsafe == about(0.05)


def test_ratios_are_numbers_where_both_words_are_impossible(tokenizer):
    rows = torch.zeros(1, 128256)
    rows[0, HELLO] = 1e4
    reader = VerdictReader(tokenizer, 0.5, 1)
    reader(rows)
    assert (reader.probabilities[0].unsafe, reader.probabilities[0].ratio) == (0, 0.5)


def test_a_tokenizer_without_the_words_is_refused(llama, tokenizer):
    assert (word_id(tokenizer, "unsafe"), word_id(tokenizer, "safe")) == (UNSAFE, SAFE)
    with pytest.raises(RequestError, match="encodes 'unsafe' as 2 tokens"):
        word_id(llama.tokenizer, "unsafe")
