"""bench_study.py on a tiny model without peers; and its handling of peers that fail or differ."""

import json

import pytest
import torch

import bench_study
from bench_study import DEMO, TASKS, Figure, inputs, main, measure, run
from folders import tiny_folder
from llama_ref.errors import RequestError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("study") / "tiny")


@pytest.fixture
def rehearsal(monkeypatch, warm):
    """Workers need not import torch first."""
    monkeypatch.setattr(bench_study.sys, "executable", str(warm / "python"))


def test_every_task_is_measured(rehearsal, tiny, capsys):
    table = main(tiny, repeats=1, tokens=12, prompts=3)
    assert list(table) == list(TASKS)
    for task, figures in table.items():
        assert figures["ours"].seconds > 0 and figures["ours"].megabytes >= 0, task
    out = capsys.readouterr().out
    assert all(title in out for title in TASKS.values()) and "load of the machine after" in out


def test_contestants_that_find_other_numbers_are_no_peers(monkeypatch, tmp_path):
    numbers = {"ours": 1.0, "nnsight": 1.0005}
    monkeypatch.setattr(bench_study, "run", lambda name, *rest: Figure(2.0, 3.0, 4.0, numbers[name]))
    assert measure(dict.fromkeys(numbers, "python"), "patterns", tmp_path, 2)["ours"] == Figure(2.0, 3.0, 4.0, 1.0)
    numbers["nnsight"] = 1.1
    with pytest.raises(RequestError, match=r"patterns: nnsight finds 1\.1, we 1: not the same task"):
        measure(dict.fromkeys(numbers, "python"), "patterns", tmp_path, 1)


def test_a_contestant_that_fails_says_why(tmp_path, warm):
    path = tmp_path / "inputs.json"
    path.write_text(json.dumps({"threads": 1}))
    with pytest.raises(RequestError, match="ours could not run patterns: KeyError: 'text'"):
        run("ours", str(warm / "python"), "patterns", path)


def test_an_unknown_task_is_refused():
    with pytest.raises(RequestError, match="only has 'gird', expected some of module_outputs"):
        main(DEMO, only="gird")


def test_what_workers_read(tiny, tmp_path):
    found = inputs(tiny, tmp_path, 12, 3, 1)
    assert len(found["text"]) == 12 and len(found["prompts"]) == 3
    assert len(found["clean"]) == len(found["corrupted"]) and found["clean"] != found["corrupted"]
    assert torch.tensor(found["text"]).dtype == torch.long
