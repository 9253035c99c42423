"""The vision benchmark measures our encoder and Meta's on the same weights."""

import re

import pytest

from bench_vision import GRIDS, measure
from llama_ref.args import ModelArgs
from vision_folders import METAS

pytestmark = pytest.mark.usefixtures("one_process_group")


def test_every_number_of_tiles_has_a_line_and_the_outputs_agree(capsys):
    measure(ModelArgs.from_dict(METAS | {"vision_dim": 32, "vision_chunk_size": 28}), "float32", 1)
    lines = capsys.readouterr().out.splitlines()
    figures = [re.fullmatch(r"(\d) +[\d.]+ +s +[\d.]+ +s +[\d.]+ +(\S+)", line) for line in lines[2:]]
    assert [int(found[1]) for found in figures] == [rows * columns for rows, columns in GRIDS]
    assert all(0 < float(found[2]) < 1e-4 for found in figures)
