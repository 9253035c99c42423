"""compare_study.py on a tiny model without peers, and what it says of peers that differ or fail."""

import torch

from compare_study import DICTIONARIES, MODELS, ask, compare, main
from folders import tiny_folder


def test_peers_that_are_not_installed_are_named(warm, tmp_path, capsys):
    rows = main(tiny_folder(tmp_path / "tiny"), warm / "python")
    assert {row.peer.split()[0] for row in rows} == {*DICTIONARIES, *MODELS} and not any(row.is_fault for row in rows)
    assert "not installed" in capsys.readouterr().out


def test_other_numbers_are_a_fault():
    ours = {"same": torch.tensor([1.0, 100]), "other": torch.tensor([1.0, 100]), "shape": torch.ones(2), "nan": torch.ones(1)}
    found = {"same": torch.tensor([1.001, 100]), "other": torch.tensor([1.1, 100]), "shape": torch.ones(3)}
    rows = compare("captum", ours, {"version": "1.0"}, found | {"nan": torch.tensor([float("nan")])})
    assert [row.verdict for row in rows] == ["OK", "DIFFERS", "DIFFERS", "DIFFERS"]
    assert [row.is_fault for row in rows] == [False, True, True, True] and rows[0].peer == "captum 1.0"


def test_a_peer_that_fails_is_a_fault_and_says_why(warm, tmp_path):
    said, found = ask(warm / "python", "captum", tmp_path)
    (row,) = compare("captum", {}, said, found)
    assert row.is_fault and row.verdict.startswith("failed: FileNotFoundError") and "inputs.json" in row.verdict
