"""bench_quality.py on a tiny model; tests/quantization uses its measurements."""

import pytest
import torch

from bench_quality import WINDOW_TOKENS, cut, main
from folders import tiny_folder
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


def test_every_row_of_the_table_is_measured(tmp_path, capsys):
    main(tiny_folder(tmp_path / "tiny"), windows=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    rows = {line[:27].strip(): line[27:].split() for line in lines}
    names = ["none", "int8", "int4", "int4, calibrated", "Meta's int4, inputs rounded", "Meta's fp8, weights only"]
    assert set(names) < set(rows)
    divergence = {name: float(rows[name][2]) for name in names}
    assert divergence["none"] == 0
    assert all(0 < divergence[name] < 0.1 for name in names if name not in ("none", "Meta's fp8, weights only"))
