"""Parse answers into verdicts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_ref.guard.categories import GUARD_3
from llama_ref.guard.verdict import Probabilities, read_verdict

NUMBERS = Probabilities(0.75, 0.25, 0.75)


def verdict(answer: str, *excluded: str):
    listed = [category for category in GUARD_3 if category.code not in excluded]
    return read_verdict(answer, NUMBERS, listed, excluded)


@pytest.mark.parametrize(
    ("answer", "word", "codes", "unknown", "as_trained"),
    [
        ("safe", "safe", [], [], True),
        ("\n\nsafe", "safe", [], [], True),
        ("unsafe\nS9,S2", "unsafe", ["S9", "S2"], [], True),
        ("unsafe\nS9, S2", "unsafe", ["S9", "S2"], [], False),
        ("unsafe\nS9,S9", "unsafe", ["S9"], [], True),
        ("unsafe\nS99,S2", "unsafe", ["S2"], ["S99"], True),
        ("unsafe", "unsafe", [], [], False),
        ("unsafe\nbad words", "unsafe", [], [], False),
        ("unsafe\nS1\nreally", "unsafe", ["S1"], [], False),
        ("Safe", "unexpected", [], [], False),
        ("safe!", "unexpected", [], [], False),
        ("I cannot\nS1", "unexpected", [], [], False),
        ("", "unexpected", [], [], False),
    ],
)
def test_an_answer_is_a_word_and_codes(answer, word, codes, unknown, as_trained):
    found = verdict(answer)
    assert (found.word, [each.code for each in found.categories], list(found.unknown)) == (word, codes, unknown)
    assert (found.is_expected, found.is_safe) == (as_trained, word == "safe")
    assert (found.unsafe_probability, found.safe_probability, found.unsafe_ratio) == (0.75, 0.25, 0.75)


def test_an_excluded_category_does_not_count():
    found = verdict("unsafe\nS6,S1", "S6")
    assert (found.word, [each.title for each in found.categories], found.excluded) == ("unsafe", ["Violent Crimes"], ("S6",))
    found = verdict("unsafe\nS6", "S6", "S1")
    assert (found.word, found.categories, found.excluded, found.answer) == ("safe", (), ("S6",), "unsafe\nS6")


@given(st.text() | st.lists(st.sampled_from(["unsafe", "safe", "\n", ",", "S1", "S", "99", " "])).map("".join))
def test_any_text_has_a_verdict(answer):
    found = verdict(answer)
    assert (found.word == "unsafe") <= answer.strip().startswith("unsafe")
    assert found.is_safe <= (answer.strip().split("\n")[0] == "safe")
