"""How bench_quality.py cuts texts into windows; what it measures is used by tests/quantization."""

import pytest
import torch

from bench_quality import WINDOW_TOKENS, cut
from llama_ref.errors import RequestError


def test_windows_begin_like_a_text():
    ids = list(range(1, 2 * WINDOW_TOKENS + 6))
    rows = cut(ids, 0, 2)
    assert rows.shape == (2, 1 + WINDOW_TOKENS)
    assert rows[:, 0].tolist() == [0, 0]
    assert torch.equal(rows[:, 1:].flatten(), torch.tensor(ids[: 2 * WINDOW_TOKENS]))


@pytest.mark.parametrize("windows", [0, 3])
def test_more_windows_than_the_text_fills_are_refused(windows):
    with pytest.raises(RequestError, match=r"windows is \d, expected 1 to 2: a text has 1,100 tokens"):
        cut(list(range(1100)), 0, windows)
