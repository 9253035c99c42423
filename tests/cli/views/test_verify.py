"""`llama-ref verify`, `checksum` and `diff`: tables, JSON, exit codes."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import REPOSITORY
from folders import PARAMS, tiny_folder
from llama_ref.checkpoint.formats.pth import inspect_pth
from llama_ref.checkpoint.integrity import verify
from llama_ref.checkpoint.verify.report import FileReport, Report, State
from llama_ref.cli import main
from llama_ref.cli.views.verify import MOST_TENSORS, print_reports

Run = Callable[..., tuple[int, str, str]]
SHARD0, SHARD1 = "consolidated.00.pth", "consolidated.01.pth"
COLOR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("view") / "whole", shards=2)


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "folder"))


@pytest.fixture
def run(capsys, monkeypatch) -> Run:
    """Run a command line in this process; return (exit code, stdout, stderr)."""
    monkeypatch.setattr("llama_ref.checkpoint.integrity.GROWTH_WAIT_SECONDS", 0)

    def run(*words: object) -> tuple[int, str, str]:
        try:
            code = main([str(word) for word in words])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """An empty folder for releases."""
    monkeypatch.setenv("LLAMA_MODELS_CONFIG_DIR", str(tmp_path / "llama"))
    (tmp_path / "llama" / "checkpoints").mkdir(parents=True)
    return tmp_path / "llama" / "checkpoints"


def cut(folder: Path) -> None:
    os.truncate(folder / SHARD1, (folder / SHARD1).stat().st_size - 1500)


def unlisted(folder: Path) -> None:
    (folder / "checklist.chk").unlink()


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


# ---- verify

CASES = {  # (change of the folder, exit code, exit code with --quick, last line)
    "whole": (lambda folder: None, 0, 0, "all 4 files are whole"),
    "cut short": (
        cut,
        1,
        1,
        f"3 of 4 files are whole; {SHARD1} is 1.5 kB short: the download broke off, fetch that file again",
    ),
    "no list": (unlisted, 3, 3, "all 4 files are sound as far as could be checked; there is no checklist.chk"),
    "no list, and cut": (lambda folder: (unlisted(folder), cut(folder)), 1, 1, "3 of 4 files are sound"),
    "a web page for a list": (
        lambda folder: (folder / "checklist.chk").write_bytes(b"<html>"),
        3,
        3,
        "4 of 5 files are sound; checklist.chk is an HTML page",
    ),
    "nothing in it": (emptied, 2, 2, "could not be checked: it holds no params.json"),
    "gone": (shutil.rmtree, 2, 2, "llama-ref: no checkpoint at"),
}


@pytest.mark.parametrize("case", CASES)
def test_exit_code_and_last_line_say_whether_it_is_whole(run, folder, root, case):
    change, expected, expected_quick, words = CASES[case]
    change(folder)
    code, out, err = run("verify", folder)
    assert code == expected and words in (out + err).splitlines()[-1]
    for words in (("--quick", folder), (folder, "--quick"), ("--quick=True", folder), (folder, "--quick", "True")):
        assert run("verify", *words)[0] == expected_quick


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"gone"}))
@pytest.mark.parametrize("quick", [False, True])
def test_json_is_the_report(run, folder, case, quick):
    CASES[case][0](folder)
    code, out, err = run("verify", folder, "--json", *["--quick"] * quick)
    found, report = json.loads(out), json.loads(verify(folder, quick=quick).to_json())
    assert err == "" and found["exit_code"] == code and found["ok"] == (code == 0)
    for either in (found, report):
        del either["seconds"]
        for file in either["files"]:
            del file["seconds"]
    assert found == report


def test_quick_hashes_nothing(run, folder):
    assert all(file["found_sum"] is None for file in json.loads(run("verify", "--quick", folder, "--json")[1])["files"])
    assert all(file["found_sum"] for file in json.loads(run("verify", folder, "--json")[1])["files"])


def test_all_checks_every_folder_and_the_worst_decides(run, root, original):
    for name, change in {"A": None, "B": cut, "C": unlisted, "D": emptied}.items():
        folder = Path(shutil.copytree(original, root / name))
        if change:
            change(folder)
    code, out, _ = run("verify", "--all")
    assert code == 1
    for line in ("all 4 files are whole", "1.5 kB short", "there is no checklist.chk", f"{root / 'D'} could not be checked"):
        assert line in out
    code, out, _ = run("verify", "--all", "--json")
    assert code == 1 and [(Path(entry["folder"]).name, entry["exit_code"]) for entry in json.loads(out)] == [
        ("A", 0),
        ("B", 1),
        ("C", 3),
        ("D", 2),
    ]
    shutil.rmtree(root / "B")
    assert run("verify", "--all")[0] == 2
    assert run("verify", "--all", "--quick")[0] == 2
    for name in "CD":
        shutil.rmtree(root / name)
    code, out, _ = run("verify", "--all", "--json")
    assert code == 0 and [entry["exit_code"] for entry in json.loads(out)] == [0]  # a list, even of one


def test_all_leaves_a_line_between_folders_and_ends_with_one_for_all(run, root, original):
    for name, change in {"A": None, "B": cut, "C": unlisted}.items():
        folder = Path(shutil.copytree(original, root / name))
        if change:
            change(folder)
    lines = run("verify", "--all")[1].splitlines()
    assert lines[-2:] == ["", "1 of 3 folders are whole; not whole: B; not checked in full: C"]
    for name in "BC":
        at = next(n for n, line in enumerate(lines) if line.startswith(str(root / name)))
        assert lines[at - 1] == "" and lines[at - 2].startswith(("all", "3 of 4"))
    for name in "BC":
        shutil.rmtree(root / name)
    assert run("verify", "--all")[1].splitlines()[-1] == "all 4 files are whole"


def test_a_folder_of_checkpoints_is_told_what_to_name(run, root, original, tmp_path):
    shutil.copytree(original, root / "A")
    shutil.copytree(original, root / "B" / "original")
    code, out, _ = run("verify", root)
    assert code == 2 and "name one of A, B, or check them all with --all" in out
    shutil.copytree(original, tmp_path / "elsewhere" / "C")
    code, out, _ = run("verify", tmp_path / "elsewhere")
    assert code == 2 and out.endswith("the folders in it do: name one of C\n")


def test_no_speed_is_told_of_files_too_small_to_measure(run, folder):
    table = run("verify", folder)[1].replace(str(folder), "")
    assert " sum " in table and "B/s" not in table and "speed" not in table


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--all", "A"),
        ("--all",),
        ("no such folder",),
        ("A", "--jobs", "0"),
        ("A", "--jobs", "two"),
        ("A", "--loud"),
    ],
)
def test_misuse_of_verify_is_2(run, root, original, words):
    if "A" in words:
        (root / "A").symlink_to(original)
    code, out, err = run("verify", *words)
    assert (code, out) == (2, "") and err


def test_a_place_that_may_not_be_entered_could_not_be_checked(run, unprivileged_folder, monkeypatch):
    hidden = unprivileged_folder / "hidden"
    (hidden / "checkpoints" / "A").mkdir(parents=True)
    hidden.chmod(0)
    monkeypatch.setenv("LLAMA_MODELS_CONFIG_DIR", str(hidden))
    for words in (["verify", "--all"], ["verify", hidden / "checkpoints" / "A"], ["verify", "A"]):
        code, out, err = run(*words)
        assert (code, out) == (2, "") and err.startswith("llama-ref: cannot l") and "Permission denied" in err
    hidden.chmod(0o700)


def test_deep_reports_what_is_not_finite(run, folder):
    tensors = torch.load(folder / SHARD0, weights_only=True)
    tensors["norm.weight"][3] = float("nan")
    torch.save(tensors, folder / SHARD0)
    assert run("checksum", folder, "--force")[0] == 0
    assert run("verify", folder)[0] == 0
    for words in ((folder, "--deep"), ("--deep", folder)):
        code, out, _ = run("verify", *words)
        assert code == 1 and "norm.weight: 1 NaN, 0 infinite" in out.splitlines()[-1]


# ---- on a terminal


def on_a_terminal(*words: object, columns: int = 80) -> str:
    """Return what is printed to a terminal of this width."""
    import pty

    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "50"}
    command = [sys.executable, "-m", "llama_ref.cli", *map(str, words)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=theirs, stdout=theirs, stderr=theirs, env=environment):
        os.close(theirs)
        sent = b""
        try:
            while chunk := os.read(ours, 1 << 16):
                sent += chunk
        except OSError:  # Linux: the other end is closed
            pass
    os.close(ours)
    return sent.decode()


def test_on_a_terminal_the_table_is_whole_and_names_send_it_no_commands(folder):
    evil = "weights_\x1b]0;owned\x07\x1b[2J\u202e[red].pt"
    (folder / evil).write_bytes(b"x")
    with (folder / "checklist.chk").open("ab") as file:
        file.write(b"0" * 32 + f"  {evil}\n".encode())
        file.write(b"0" * 32 + b"  \x1b[31mlisted\x9b2J.pth\n")
    cut(folder)
    sent = on_a_terminal("verify", folder)
    table = sent[sent.index(f"{folder}"[:20]) :]  # without the progress bars, which move the cursor
    assert "\x1b" not in COLOR.sub("", table) and not re.search("[\x07\x9b\u202e]", sent)
    assert "\x1b[2J" not in sent and "\x1b]" not in sent and "\x1b[31mlisted" not in sent
    assert r"weights_\x1b]0;owned\x07\x1b[2J\u202e[red].pt" in COLOR.sub("", table).replace("\r\n", "")


class Terminal:
    """A stand-in for standard output that claims to be a terminal, and records what is written."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


SUM = hashlib.md5(b"").hexdigest()
WIDEST = [  # (name, size, expected size) of the widest rows with usual names
    ("consolidated.00.pth", 16_060_522_496, 16_060_522_496),
    ("consolidated.15.pth", 999_000_000_000, 998_000_000_000),
    ("tokenizer.model", 2_183_982, 2_183_982),
    ("params.json", 199, 2_183_982),
]


@pytest.mark.parametrize("state", State)
def test_80_columns_hold_every_state_of_files_with_usual_names(monkeypatch, state):
    files = [FileReport(name, state, size, expected, SUM, SUM, seconds=size / 1.23e9) for name, size, expected in WIDEST]
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    print_reports([Report(Path("/models/Llama3.1-405B-Instruct"), files)], as_json=False)
    lines = COLOR.sub("", terminal.text).splitlines()
    assert lines[-1].startswith(("4 of 4", "all 4", "0 of 4"))  # the last line may be longer
    assert max(map(len, lines[:-1])) <= 80
    rows = "\n".join(lines[:-1])
    for name, *_ in WIDEST:
        assert re.search(rf"^  {re.escape(name)} ", rows, re.MULTILINE)
    assert all(word in rows for word in ("1.23 GB/s", "16.1 GB", SUM[:8], *str(state).split())) and "…" not in rows


def test_into_a_pipe_no_long_name_is_cut(run, folder):
    name = "weights_" + "long" * 20 + ".pt"
    (folder / name).write_bytes(b"x")
    with (folder / "checklist.chk").open("a") as file:
        file.write(f"{'0' * 32}  {name}\n")
    assert re.search(rf"^  {name} ", run("verify", folder)[1], re.MULTILINE)


# ---- checksum


@pytest.mark.parametrize(("algorithm", "tool"), [("md5", "md5sum"), ("sha256", "sha256sum")])
def test_checksum_writes_what_md5sum_reads(run, folder, algorithm, tool):
    unlisted(folder)
    code, out, err = run("checksum", folder, "--algorithm", algorithm)
    assert (code, out, err) == (0, f"{folder / 'checklist.chk'}\n", "")
    done = subprocess.run([tool, "--strict", "-c", "checklist.chk"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    assert sorted(done.stdout.splitlines()) == [f"./{n}: OK" for n in (SHARD0, SHARD1, "params.json", "tokenizer.model")]
    assert run("verify", folder)[0] == 0
    cut(folder)
    done = subprocess.run([tool, "--status", "-c", "checklist.chk"], cwd=folder, check=False)
    assert done.returncode == 1 == run("verify", folder)[0]


def test_checksum_replaces_a_list_only_when_told_to(run, folder):
    before = (folder / "checklist.chk").read_bytes()
    code, out, err = run("checksum", folder)
    assert (code, out) == (2, "") and "--force replaces it" in err
    assert run("checksum", "--force", folder, "--algorithm=sha256")[0] == 0
    after = (folder / "checklist.chk").read_bytes()
    assert after != before and len(after.split()[0]) == 64
    assert run("checksum", folder, "--algorithm", "sha1", "--force")[0] == 2
    assert (folder / "checklist.chk").read_bytes() == after


def test_checksum_vouches_for_nothing_that_is_broken(run, folder):
    cut(folder)
    before = (folder / "checklist.chk").read_bytes()
    code, out, err = run("checksum", folder, "--force")
    assert (code, out) == (1, "") and "1.5 kB short" in err and err.count("\n") == 1
    assert (folder / "checklist.chk").read_bytes() == before


# ---- diff


def changed(folder: Path, n: int = 1) -> Path:
    """Change values in the first `n` tensors of the first shard."""
    tensors = torch.load(folder / SHARD0, weights_only=True)
    for name in list(tensors)[:n]:
        tensors[name] = tensors[name] + 1
    torch.save(tensors, folder / SHARD0)
    return folder


def test_diff_of_the_same_is_one_line_and_0(run, original, tmp_path):
    other = tiny_folder(tmp_path / "one", shards=1)
    assert run("diff", original, other) == (0, "identical: 21 tensors, params.json and tokenizer\n", "")
    code, out, err = run("diff", original, other, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "identical": True,
        "a": str(original),
        "b": str(other),
        "n_tensors": 21,
        "params": [],
        "tokenizer": None,
        "tensors": [],
    }


def test_diff_shows_what_differs_and_is_1(run, original, folder):
    changed(folder, MOST_TENSORS + 3)
    (folder / "params.json").write_text(json.dumps(PARAMS | {"norm_eps": 1e-6, "x": "\x1b[2J"}))
    (folder / "tokenizer.model").unlink()
    code, out, err = run("diff", original, folder)
    assert (code, err) == (1, "") and "\x1b" not in out
    assert out.startswith(f"a: {original}\nb: {folder}\nparams.json: norm_eps: 1e-05 in a, 1e-06 in b\n")
    assert "tokenizer.model: only a has one" in out and "15 of 21 tensors differ" in out and "and 3 more" in out
    assert len(re.findall(r"^  (tok_|layers|norm|output)", out, re.MULTILINE)) == MOST_TENSORS
    code, out, _ = run("diff", "--json", original, folder)
    found = json.loads(out)
    assert code == 1 and not found["identical"] and len(found["tensors"]) == 15 and len(found["params"]) == 2
    assert {tensor["what"] for tensor in found["tensors"]} == {"values", "the shards of b disagree about it"}


def test_a_tensors_name_sends_the_terminal_no_commands(run, original, folder):
    tensors = torch.load(folder / SHARD0, weights_only=True)
    torch.save(tensors | {"\x1b]0;owned\x07": torch.ones(2)}, folder / SHARD0)
    code, out, _ = run("diff", original, folder)
    assert code == 1 and r"\x1b]0;owned\x07" in out and "\x1b" not in out
    code, _, err = run("complete", folder, "hi", "--verify", "never", "--device", "cpu")
    assert code == 1 and r"\x1b]0;owned\x07" in err and "\x1b" not in err


def broken(folder: Path) -> None:
    (folder / SHARD1).write_bytes(b"<html>")


@pytest.mark.parametrize("case", [cut, broken, emptied, shutil.rmtree])
def test_diff_of_what_cannot_be_read_is_2(run, original, folder, case):
    case(folder)
    for pair in ((original, folder), (folder, original)):
        code, out, err = run("diff", *pair)
        assert (code, out) == (2, "") and err.startswith("llama-ref: ") and "Traceback" not in err


def test_diff_needs_two_folders(run, original):
    code, out, err = run("diff", original)
    assert (code, out) == (2, "") and err


# ---- switches


@pytest.mark.parametrize("no", ["--force=false", "--force=no", "--force=0", "--force=False"])
def test_a_switch_that_is_off_is_off(run, folder, no):
    before = (folder / "checklist.chk").read_bytes()
    assert run("checksum", folder, "--algorithm", "sha256", no)[0] == 2
    assert (folder / "checklist.chk").read_bytes() == before


@pytest.mark.parametrize("quick", ["-q", "--quick", "--quick=true", "--quick=yes"])
def test_a_switch_before_the_name_is_not_given_the_name(run, folder, quick):
    code, out, _ = run("verify", quick, folder)
    assert code == 0
    assert "sound" in out


def test_a_switch_that_is_neither_on_nor_off_is_misuse(run, folder):
    code, _, err = run("verify", folder, "--quick=perhaps")
    assert code == 2
    assert "--quick is 'perhaps', expected true or false" in err


def test_checksum_does_not_vouch_for_weights_that_their_own_archive_calls_damaged(run, folder):
    data = bytearray((folder / SHARD0).read_bytes())
    data[inspect_pth(folder / SHARD0)["norm.weight"].file_offset] ^= 1
    (folder / SHARD0).write_bytes(data)
    (folder / "checklist.chk").unlink()
    code, _, err = run("checksum", folder)
    assert code == 1
    assert "CRC-32" in err
    assert not (folder / "checklist.chk").exists()
