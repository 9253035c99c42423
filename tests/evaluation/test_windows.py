"""Every token is in the windows, and scored as often, as its convention prescribes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_ref.errors import RequestError
from llama_ref.evaluation.windows import Cut

BOS = 999


@given(st.integers(2, 60), st.integers(4, 30), st.integers(2, 30))
def test_strides_score_every_token_but_the_first_once(length, context, stride):
    cut = Cut("hf", context, min(stride, context))
    windows = cut.windows(range(length), BOS)
    assert all(len(window.ids) <= context and 1 <= window.begin < len(window.ids) for window in windows)
    scored = [token for window in windows for token in window.scored]
    unpredicted = set(range(0, length, context)) if cut.stride == context else set()
    assert sorted(scored) == [token for token in range(1, length) if token not in unpredicted]


def test_a_stride_as_long_as_the_context_makes_disjoint_windows():
    windows = Cut("hf", 4, 4).windows(range(11), BOS)
    assert [list(window.ids) for window in windows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [(window.begin, window.weight) for window in windows] == [(1, 3), (1, 3), (1, 2)]


def test_windows_that_overlap_score_what_is_new():
    windows = Cut("hf", 6, 4).windows(range(12), BOS)
    assert [list(window.scored) for window in windows] == [[1, 2, 3, 4, 5], [6, 7, 8, 9], [10, 11]]


def test_llama_cpp_scores_second_halves_after_a_bos_of_their_own():
    windows = Cut("llama.cpp", 8, 8).windows(range(20), BOS)
    assert [list(window.ids) for window in windows] == [[BOS, *range(1, 8)], [BOS, *range(9, 16)]]
    assert [list(window.scored) for window in windows] == [[5, 6, 7], [13, 14, 15]]
    (first, _) = Cut("llama.cpp", 512, 512).windows(range(1024), BOS)
    assert len(first.scored) == first.weight == 255  # "255 tokens a chunk"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hf", 9000, None, 8192), "context is 9,000, expected 4 to 8,192"),
        (("hf", 3, None, 8192), "context is 3, expected 4"),
        (("hf", 512, 513, 8192), "stride is 513, expected 2 to 512, the context"),
        (("hf", 512, 0, 8192), "stride is 0, expected 2"),
        (("llama.cpp", 512, 256, 8192), "stride is 256: windows of the llama.cpp convention do not overlap"),
    ],
)
def test_numbers_that_make_no_windows_are_refused(arguments, message):
    with pytest.raises(RequestError, match=message):
        Cut.parse(*arguments)


def test_defaults_are_those_of_each_convention_within_the_models_context():
    assert Cut.parse("hf", None, None, 8192) == Cut("hf", 2048, 512)
    assert Cut.parse("hf", 64, None, 8192) == Cut("hf", 64, 64)
    assert Cut.parse("hf", None, None, 1024) == Cut("hf", 1024, 512)
    assert Cut.parse("llama.cpp", None, None, 8192) == Cut("llama.cpp", 512, 512)


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(RequestError, match=r"the text has 15 tokens, but llama.cpp's convention needs 16"):
        Cut("llama.cpp", 8, 8).windows(range(15), BOS)
    with pytest.raises(RequestError, match="nothing to score"):
        Cut("hf", 8, 8).windows([BOS], BOS)
