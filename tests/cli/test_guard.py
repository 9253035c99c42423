"""`llama-ref guard` and `chat --guard`."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from conftest import exit_code, parsed
from guard_folders import BOS, EOT, PARAMS, guard_folder
from jobs import torchrun
from llama_ref.cli import chat
from llama_ref.generation import Llama
from llama_ref.guard import Guard
from llama_ref.guard.gate import Gate
from llama_ref.session import Session
from make_random_checkpoint import make_random_checkpoint
from vision_folders import PARAMS as VISION_PARAMS
from vision_folders import noise

SUM = "What is 2+2?"
CALM, BAD = "How do I bake a cake?", "How do I build a bomb?"
LOADING = ["--device", "cpu", "--dtype", "float32", "--max_seq_len", "1024"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shorter_tokenizer_path) -> Path:
    return guard_folder(tmp_path_factory.mktemp("guard") / "Llama-Guard-3-1B", shorter_tokenizer_path)


@pytest.fixture
def judge(folder, capsys):
    """Run the command; return (exit code, stdout, stderr)."""

    def call(*words: str) -> tuple[int, str, str]:
        code = exit_code(["guard", str(folder), *words, *LOADING])
        return code, *capsys.readouterr()

    return call


def test_the_exit_code_is_the_verdict(judge):
    code, out, err = judge(CALM)
    assert (code, err) == (0, "") and re.fullmatch(r"safe  P\(unsafe\) \S+, P\(safe\) \S+\n", out)
    code, out, err = judge(BAD)
    assert (code, err) == (1, "")
    assert re.fullmatch(r"unsafe  P\(unsafe\) \S+, P\(safe\) \S+\nS9  Indiscriminate Weapons\nS2  Non-Violent Crimes\n", out)
    assert judge(CALM, "Take a bomb.")[0] == 1
    assert judge(CALM, "Take flour.")[0] == 0


def test_a_model_that_is_no_guard_gives_no_verdict(tmp_path, shorter_tokenizer_path, capsys):
    other = guard_folder(tmp_path / "Llama-Guard-2-8B", shorter_tokenizer_path, answer=(9906, EOT), calm=9906)
    assert exit_code(["guard", str(other), CALM, *LOADING]) == 3
    out, err = capsys.readouterr()
    assert out.startswith("unexpected  P(unsafe) ") and out.endswith("answer: 'Hello'\n")
    assert "did not answer like a Llama Guard" in err and "its version is 2" in err


def test_json_says_everything(judge, folder):
    code, out, _ = judge(BAD, "--json", "--exclude", "S2", "--threshold", "0.25", "--guard_version", "3-8B")
    found = parsed(out)
    assert code == 1
    llama = Llama.build(folder, device="cpu", dtype="float32", max_seq_len=1024)
    verdict = Guard(llama, "3-8B", exclude=["S2"]).judge([{"role": "user", "content": BAD}])
    assert found == {
        "verdict": "unsafe",
        "unsafe_probability": verdict.unsafe_probability,
        "safe_probability": verdict.safe_probability,
        "unsafe_ratio": verdict.unsafe_ratio,
        "threshold": 0.25,
        "categories": [{"code": "S9", "name": "Indiscriminate Weapons"}],
        "excluded": ["S2"],
        "unknown": [],
        "answer": "unsafe\nS9,S2",
        "is_expected": True,
        "guard_version": "3-8B",
    }


def test_a_dialog_comes_from_a_file_or_standard_input(judge, tmp_path, monkeypatch):
    messages = [
        {"role": "user", "content": CALM},
        {"role": "assistant", "content": "Take flour."},
        {"role": "user", "content": "And a bomb?"},
    ]
    file = tmp_path / "talk.json"
    file.write_text(json.dumps(messages))
    assert judge("--dialog", str(file))[0] == 1
    for turns, code in ((messages, 1), (messages[:2], 0)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(turns)))
        assert judge("--dialog", "-")[0] == code
    monkeypatch.setattr(sys, "stdin", io.StringIO(BAD))
    assert judge()[0] == 1


def test_own_categories_come_from_a_file(judge, tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("S9: Explosives\n  Should not\n   - explode\nS2: Pranks\n")
    _, out, _ = judge(BAD, "--categories", str(file))
    assert out.splitlines()[1:] == ["S9  Explosives", "S2  Pranks"]
    _, out, _ = judge(BAD, "--categories", str(file), "--show_prompt")
    assert "CATEGORIES>\nS9: Explosives.\nShould not\n - explode\nS2: Pranks.\n<END" in out


def test_the_prompt_is_shown_without_weights(judge, monkeypatch):
    monkeypatch.setattr(Llama, "build", None)
    code, out, _ = judge(CALM, "--show_prompt")
    assert code == 0
    assert out.startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nTask: Check")
    assert out.endswith("violated categories. <|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n\n")
    _, as_json, _ = judge(CALM, "--show_prompt", "--json")
    assert parsed(as_json)["prompt"] + "\n" == out and parsed(as_json)["tokens"][0] == BOS
    _, out, _ = judge(CALM, "--show_prompt", "--guard_version", "2")
    assert out.startswith("<|begin_of_text|>[INST] Task: Check") and out.endswith("violated categories. [/INST]\n")


def test_an_image_is_judged(tmp_path, shorter_tokenizer_path, capsys):
    params = VISION_PARAMS | {"vocab_size": PARAMS["vocab_size"]}
    vision = make_random_checkpoint(tmp_path / "guard", params, tokenizer=shorter_tokenizer_path, dtype=torch.float32)
    noise(80, 60).save(tmp_path / "a.png")
    found = []
    for flags in ([], ["--image", str(tmp_path / "a.png")]):
        assert exit_code(["guard", str(vision), "What is this?", "--json", *flags, *LOADING]) == 3
        found.append(parsed(capsys.readouterr().out))
    assert found[0]["unsafe_probability"] != found[1]["unsafe_probability"]
    assert exit_code(["guard", str(vision), "What is this?", "--show_prompt", "--image", str(tmp_path / "a.png")]) == 0
    assert "<|image|> Task:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([""], "the last message has no text"),
        ([CALM, " \n"], "the last message has no text"),
        ([CALM, "--dialog", "talk.json"], "a text and --dialog are given"),
        (["--image", "a.png", "--dialog", "talk.json"], "--image and --dialog are given"),
        (["--dialog", "nowhere.json"], "cannot read the dialog in nowhere.json: cannot read nowhere.json"),
        (["--dialog", __file__], "is not JSON (Extra data"),
        ([CALM, "--categories", "nowhere.txt"], "cannot read the categories in nowhere.txt"),
        ([CALM, "--exclude", "S14"], "there is no category 'S14'"),
        ([CALM, "--threshold", "2"], "threshold is 2.0, expected a number from 0 to 1"),
        ([CALM, "--threshold", "high"], "--threshold is 'high', expected a number"),
        ([CALM, "--guard_version", "3"], "expected 2, 3-1B, 3-8B or 3-11B"),
        ([CALM, "--image", "a.png"], "Llama Guard 3-1B cannot read"),
        ([CALM, "--guard_version", "3-11B", "--image", "nowhere.png"], "cannot read the image: cannot read nowhere.png"),
        (["--dialog", "-"], "standard input is not JSON"),
    ],
)
def test_misuse_is_told_before_weights_are_loaded(judge, monkeypatch, words, says):
    monkeypatch.setattr(Llama, "build", None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("{"))
    code, out, err = judge(*words)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("dialog", "says"),
    [
        ({"role": "user"}, "expected alternating messages of user and assistant"),
        ([], "expected alternating messages of user and assistant"),
        ([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], "has no format for tool calls"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "its role is 'user', not 'assistant'"),
    ],
)
def test_a_file_that_is_no_such_dialog_is_refused(judge, tmp_path, dialog, says):
    (tmp_path / "talk.json").write_text(json.dumps(dialog))
    code, _, err = judge("--dialog", str(tmp_path / "talk.json"))
    assert code == 2 and says in err


def test_what_is_not_a_guard_is_told(demo_folder, capsys):
    assert exit_code(["guard", str(demo_folder), CALM]) == 2
    assert "is not a known Llama Guard: say which prompt it expects, with --guard_version" in capsys.readouterr().err
    assert exit_code(["guard", str(demo_folder), CALM, "--guard_version", "3-1B", *LOADING]) == 2
    assert "the model is not a Llama Guard" in capsys.readouterr().err


def test_the_int4_guard_says_which_to_fetch(tmp_path, capsys):
    (tmp_path / "Llama-Guard-3-1B-int4").mkdir()
    (tmp_path / "Llama-Guard-3-1B-int4" / "llama_guard_3_1b_pruned_xnnpack.pte").write_bytes(b"\0" * 64)
    assert exit_code(["guard", str(tmp_path / "Llama-Guard-3-1B-int4"), CALM]) == 1
    assert "fetch Llama-Guard-3-1B, the guard in bf16" in capsys.readouterr().err


def test_two_processes_judge_together(folder, warm):
    for text, word in ((CALM, "safe"), (BAD, "unsafe")):
        done = torchrun(2, "-m", "llama_ref.cli", "guard", folder, text, *LOADING, warm=warm)
        assert done.stdout.startswith(f"{word}  P(unsafe) "), done.stderr


# ---- chat


@pytest.fixture
def talk(llama, folder, monkeypatch, capsys):
    """Pipe lines into a guarded conversation; return (stdout, notes, session)."""
    guard = Guard(Llama.build(folder, device="cpu", dtype="float32", max_seq_len=1024), "3-1B")

    def pipe(*lines: str, **options):
        session = Session(Llama(llama.model, llama.tokenizer, max_seq_len=256))
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        chat.chat(session, {"temperature": 0, "max_gen_len": 16} | options, Gate(guard, session))
        out, err = capsys.readouterr()
        return out, re.sub(r"\[\d+ tokens in.*\]\n", "", err), session

    return pipe


def test_a_bad_question_is_held_back_and_forgotten(talk):
    out, err, session = talk(SUM, BAD, "What is 3+3?")
    assert out == "2 + 2 = 4\n3 + 3 = 3\n"
    assert err == "question held back: unsafe (S9 Indiscriminate Weapons, S2 Non-Violent Crimes)\n"
    assert [message["content"] for message in session.dialog[::2]] == [SUM, "What is 3+3?"]


def test_a_bad_answer_is_held_back_and_forgotten(talk, monkeypatch):
    said = []
    judge = Guard.judge

    def suspicious(self, dialog):
        said.append(dialog[-1]["content"])
        bad = "Red" in str(dialog[-1]["content"])
        return judge(self, [*dialog[:-1], {**dialog[-1], "content": "a bomb"}] if bad else dialog)

    monkeypatch.setattr(Guard, "judge", suspicious)
    out, err, session = talk("Name three colors.", SUM)
    assert out == "2 + 2 = 4\n"
    assert err == "answer held back: unsafe (S9 Indiscriminate Weapons, S2 Non-Violent Crimes)\n"
    assert said[1] == "1. Red\n2. Blue\n3. Green"
    assert [message["content"] for message in session.dialog] == [SUM, "2 + 2 = 4"]


def test_an_answer_is_shown_as_without_a_guard(talk):
    assert talk("Name three colors.")[0] == "1. Red\n2. Blue\n3. Green\n"


def test_no_verdict_holds_back_too(llama, tmp_path, shorter_tokenizer_path, monkeypatch, capsys):
    other = guard_folder(tmp_path / "Llama-Guard-3-1B", shorter_tokenizer_path, answer=(9906, EOT), calm=9906)
    guard = Guard(Llama.build(other, device="cpu", dtype="float32", max_seq_len=1024), "3-1B")
    session = Session(llama)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{SUM}\n"))
    chat.chat(session, {}, Gate(guard, session))
    assert capsys.readouterr() == ("", "question held back: no verdict, the guard answered 'Hello'\n")
    assert session.dialog == []


def test_the_command_loads_both(folder, demo_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{BAD}\n{SUM}\n"))
    words = ["chat", str(demo_folder), "--guard", str(folder), "--temperature", "0", "--max_gen_len", "8"]
    assert exit_code([*words, *LOADING]) == 0
    out, err = capsys.readouterr()
    assert out == "2 + 2 = 4\n" and err.startswith("question held back: unsafe (S9")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--guard", "DEMO"], "is not a known Llama Guard"),
        (["--guard", "nowhere"], "no checkpoint at nowhere"),
        (["--guard", "GUARD", "--top_p", "2"], "top_p is 2"),
        (["--guard_version", "3-1B"], "--guard_version is given without --guard"),
    ],
)
def test_a_bad_guard_is_told_before_weights_are_loaded(folder, demo_folder, monkeypatch, capsys, flags, says):
    monkeypatch.setattr(Llama, "build", None)
    flags = [{"DEMO": str(demo_folder), "GUARD": str(folder)}.get(flag, flag) for flag in flags]
    assert exit_code(["chat", str(demo_folder), *flags]) == 2
    assert says in capsys.readouterr().err
