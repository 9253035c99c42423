"""`llama-ref`: commands, their output and exit codes, and errors without tracebacks."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import exit_code
from folders import tiny_folder
from llama_ref.formatting import human_bytes
from llama_ref.generation import Llama

CAPITAL = "The capital of France is"
PACE = r"\[\d+ tokens in(, first token after \d+\.\d\d s)?; \d+ out(, \d+\.\d tokens/s)?; (stop|length)\]\n"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def name(demo_folder) -> str:
    return str(demo_folder)


@pytest.fixture(scope="module")
def build_once() -> Callable[..., Llama]:
    """Make Llama.build load the same weights only once."""
    built: dict[str, Llama] = {}
    build = Llama.build

    def remembering(*args: Any, progress: Any = None, **options: Any) -> Llama:
        key = repr((args, options))
        if key not in built:
            built[key] = build(*args, progress=progress, **options)
        llama = built[key]
        return Llama(llama.model, llama.tokenizer, max_seq_len=llama.max_seq_len, seed=options["seed"])

    return remembering


@pytest.fixture
def run(build_once, monkeypatch, capsys) -> Run:
    """Run a command line in this process; return (exit code, stdout, stderr)."""
    monkeypatch.setattr(Llama, "build", build_once)

    def run(*words: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        return exit_code(words), *capsys.readouterr()

    return run


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """An empty folder for releases."""
    monkeypatch.setenv("LLAMA_MODELS_CONFIG_DIR", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


# ---- list, info


def test_list_shows_what_is_there_and_what_is_wrong_with_it(run, root, demo_folder):
    (root / "Real").symlink_to(demo_folder)
    (root / "Empty").mkdir()
    (root / "[bold] [odd]:smile:").mkdir()
    (root / ".hidden").mkdir()
    code, out, err = run("list")
    assert (code, err) == (0, "")
    assert re.search(r"Real .* 1 .* yes", out) and re.search(r"Empty .* is empty", re.sub(r"\s*│\n│[ │]*", " ", out))
    assert "[bold] [odd]" in out and ":smile:" in out and ".hidden" not in out

    code, out, _ = run("list", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert set(rows) == {"Real", "Empty", "[bold] [odd]:smile:"}
    size = (demo_folder / "consolidated.00.pth").stat().st_size
    assert rows["Real"] == {"name": "Real", "shards": 1, "bytes": size, "checklist": True, "note": ""}
    assert "is empty; fetch params.json" in rows["Empty"]["note"]


def test_an_empty_list_says_where_it_looked(run, root):
    code, out, _ = run("list")
    assert code == 0 and f"{root} holds no checkpoints" in out
    assert run("list", "--json")[:2] == (0, "[]\n")


def test_info_adds_up(run, name, llama):
    code, out, err = run("info", name, "--json")
    info = json.loads(out)
    assert (code, err) == (0, "")
    model = {parameter.data_ptr(): parameter for parameter in llama.model.parameters()}
    assert info["parameters"] == sum(map(torch.numel, model.values()))
    assert info["weight_bytes"] == {"bfloat16": 2 * info["parameters"], "float32": 4 * info["parameters"]}
    assert (info["n_layers"], info["dim"], info["n_heads"], info["n_kv_heads"], info["ffn_dim"]) == (30, 576, 9, 3, 1536)
    assert info["kv_cache_bytes"]["8192"] == 2 * 30 * 3 * 64 * 8192 * 2

    code, out, err = run("info", name)
    assert (code, err) == (0, "")
    for shown in (f"{info['parameters']:,}", "9 query heads, 3 key/value heads", human_bytes(info["weight_bytes"]["bfloat16"])):
        assert shown in out


def test_nothing_of_a_long_path_is_cut_off(run, root, demo_folder):
    deep = root.joinpath(*["a_rather_long_folder_name"] * 5)
    deep.parent.mkdir(parents=True)
    deep.symlink_to(demo_folder)
    _, out, _ = run("info", str(deep))
    assert str(deep) in re.sub(r"\s*│\n│\s*│\s*", "", out)


# ---- complete


def test_the_text_goes_to_stdout_and_the_pace_to_stderr(run, name):
    code, out, err = run("complete", name, CAPITAL, "--temperature", "0", "--max_gen_len=4")
    assert (code, out) == (0, " Paris.\n\n\n")
    assert re.fullmatch(PACE, err)
    assert re.search(r"\[6 tokens in, .*; 4 out, .*; length\]", err)


@pytest.mark.parametrize(
    "prompt", ["42", "1e3", "-5", "-5.5", "None", "True", "[1, 2]", '{"a": 1}', "'q'", '"q"', "한국의", "👍", " a ", ""]
)
def test_a_prompt_is_text_whatever_it_looks_like(run, name, prompt):
    code, out, err = run("complete", name, prompt, "--max_gen_len", "0", "--echo")
    assert (code, out) == (0, f"{prompt}\n")
    assert re.fullmatch(PACE, err)


def test_a_name_that_looks_like_a_number_is_a_name(run, root, demo_folder):
    (root / "1e3").symlink_to(demo_folder)
    assert run("complete", "1e3", "--prompt", "7", "--max_gen_len", "0", "--echo")[:2] == (0, "7\n")


def test_without_a_prompt_standard_input_is_the_prompt(run, name):
    assert run("complete", name, "--max_gen_len", "0", "--echo", stdin="두 줄\n5")[:2] == (0, "두 줄\n5\n")
    assert run("complete", name, "--temperature", "0", "--max_gen_len", "1", stdin=CAPITAL)[:2] == (0, " Paris\n")


def test_special_tokens_in_a_text_are_noticed_and_read_on_request(run, name, caplog):
    turn = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nName three colors.<|eot_id|>"
    turn += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    words = ("complete", name, turn, "--max_gen_len", "12", "--temperature", "0")
    code, _, err = run(*words)
    assert code == 0 and err.startswith(
        "the text spells <|begin_of_text|>, <|start_header_id|>, <|end_header_id|>, <|eot_id|>, "
    )
    assert "--special_tokens" in err
    code, out, err = run(*words, "--special_tokens")
    assert (code, out) == (0, "1. Red\n2. Blue\n3. Green\n")  # as `chat` answers
    assert re.fullmatch(PACE, err) and err.startswith("[15 tokens in, ")


def test_seed_none_is_another_seed_each_time(run, name):
    words = ("complete", name, CAPITAL, "--max_gen_len", "8", "--temperature", "9", "--top_p", "1", "--seed", "none")
    assert run(*words)[1] != run(*words)[1]


def test_threads_are_those_that_were_asked_for(run, name):
    before = torch.get_num_threads()
    try:
        for threads in (3, 1):
            assert run("complete", name, "x", "--max_gen_len", "1", "--threads", str(threads))[0] == 0
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_options_reach_the_generation(run, name):
    def text(*options: str) -> str:
        code, out, _ = run("complete", name, CAPITAL, "--max_gen_len", "6", *options)
        assert code == 0
        return out

    greedy = text("--temperature", "0")
    assert greedy.startswith(" Paris.\n\nThe")
    hot = ("--temperature", "1.5", "--top_p", "1")
    assert text(*hot) == text(*hot, "--seed", "1") != text(*hot, "--seed", "2")
    assert text(*hot, "--top_k", "1") == text(*hot, "--min_p", "1") == greedy
    assert text("--temperature", "0", "--repetition_penalty", "1e6") != greedy
    assert text("--temperature", "0", "--stop", "Paris") == " \n"
    assert text("--temperature", "0", "--stop", '["x", ".\\n"]') == " Paris\n"
    assert text("--temperature", "0", "--stop", "[") == greedy


# ---- chat


def test_chat_through_a_pipe_answers_each_line(run, name):
    code, out, err = run("chat", name, "--system", "42", "--max_gen_len", "1", "--temperature", "0", stdin="Hi\n/bogus\n안녕\n")
    assert code == 0
    assert len(out.splitlines()) >= 2
    assert re.fullmatch(f"{PACE}unknown command /bogus .*\n{PACE}", err)


# ---- misuse


@pytest.mark.parametrize("command", ["info", "complete", "chat"])
def test_a_wrong_name_is_misuse_and_tells_the_right_ones(run, root, command):
    (root / "Llama3.2-1B-Instruct").mkdir()
    code, out, err = run(command, "Llama3.2-1B-instruc", *(["x"] if command == "complete" else []))
    assert (code, out) == (2, "")
    assert err.startswith("llama-ref: ") and err.count("\n") == 1
    assert f"did you mean Llama3.2-1B-Instruct? {root} holds: Llama3.2-1B-Instruct" in err


@pytest.mark.parametrize(
    "words",
    [
        ["bogus"],
        ["info"],
        ["complete"],
        ["chat"],
        ["list", "x"],
        ["info", "nowhere", "x"],
        ["info", "nowhere", "--bogus"],
        ["complete", "nowhere", "x", "y"],
        ["complete", "nowhere", "x", "--bogus", "3"],
        ["complete", "nowhere", "x", "--max-new-tokens=3"],
        ["chat", "nowhere", "--bogus"],
    ],
    ids=" ".join,
)
def test_words_that_make_no_sense_are_refused_before_anything_is_looked_for(run, words):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"llama-ref: (unknown|unexpected|missing) .* \(see llama-ref.* --help\)\n", err)


@pytest.mark.parametrize("command", ["complete", "chat"])
@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("temperature", "-1"),
        ("temperature", "hot"),
        ("temperature", "True"),
        ("top_p", "0"),
        ("top_p", "1.01"),
        ("top_k", "0"),
        ("top_k", "2.5"),
        ("top_k", "1e999"),
        ("min_p", "7"),
        ("repetition_penalty", "0"),
        ("max_gen_len", "-1"),
        ("max_gen_len", "1.5"),
        ("stop", ""),
        ("stop", "[1]"),
        ("seed", "-1"),
        ("seed", "99999999999999999999"),
        ("max_seq_len", "0"),
        ("max_seq_len", "many"),
        ("dtype", "int8"),
        ("device", "gpu"),
    ],
)
def test_bad_values_are_refused_before_anything_is_looked_for(run, command, flag, value):
    """Before the model is loaded, and not at each turn of `chat`."""
    code, out, err = run(command, "nowhere", f"--{flag}={value}", stdin="hello\n")
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"llama-ref: (unknown )?((--)?{flag}|{value}) .*\n", err)


def test_a_prompt_longer_than_the_context_is_misuse_and_names_both(run, name):
    code, out, err = run("complete", name, "a b c d e f g h", "--max_seq_len", "5")
    assert (code, out) == (2, "")
    assert "the prompt has 9 tokens, but max_seq_len is 5" in err


@pytest.mark.parametrize("command", ["complete", "chat"])
def test_a_context_too_large_for_the_memory_is_misuse(run, name, command):
    code, out, err = run(command, name, "--max_seq_len", "1000000000000", stdin="hello")
    assert (code, out) == (2, "")
    assert err.startswith("llama-ref: not enough memory for the keys and values") and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_misuse(run, name):
    code, _, err = run("complete", name, "x", "--device", "cuda")
    assert code == 2 and "cuda" in err


# ---- what is wrong on disk


def damaged(folder: Path, demo_folder: Path, how: str) -> None:
    folder.mkdir()
    for file in demo_folder.iterdir():
        (folder / file.name).symlink_to(file)
    shard, params = folder / "consolidated.00.pth", folder / "params.json"
    match how:
        case "cut short":
            shard.unlink()
            with (demo_folder / shard.name).open("rb") as whole:
                shard.write_bytes(whole.read(1 << 20))
        case "a web page":
            shard.unlink()
            shard.write_text("<!DOCTYPE html><title>Sign in</title>")
        case "no weights":
            shard.unlink()
        case "a link to nothing":
            shard.unlink()
            shard.symlink_to(folder / "gone.pth")
        case "bad params.json":
            params.unlink()
            params.write_text("{")
        case "another shape":
            params.unlink()
            params.write_text((demo_folder / "params.json").read_text().replace('"dim": 576', '"dim": 1152'))
        case "no tokenizer":
            (folder / "tokenizer.model").unlink()


HARMS = ["cut short", "a web page", "no weights", "a link to nothing", "bad params.json", "another shape", "no tokenizer"]


@pytest.mark.parametrize("how", HARMS)
def test_a_damaged_folder_is_one_line_and_1(run, root, demo_folder, how):
    folder = root / "Damaged"
    damaged(folder, demo_folder, how)
    code, out, err = run("complete", "Damaged", "x", "--max_gen_len", "1")
    assert (code, out) == (1, "")
    assert err.startswith("llama-ref: ") and str(folder) in err
    assert run("list")[0] == 0, "one bad folder hides the others"
    assert run("info", "Damaged")[0] in (0, 1)


# ---- as a process


def start(*words: str, warm: Path | None = None, **options: Any) -> subprocess.Popen:
    """Start a command line; pass the fixture `warm` if Python's startup and exit do not matter."""
    program = [warm / "llama-ref"] if warm else [sys.executable, "-m", "llama_ref.cli"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([*program, *words], text=True, encoding="utf-8", **pipes)


def test_ctrl_c_while_it_generates_is_130(name, warm):
    words = ("complete", name, "A long story:", "--temperature", "0", "--repetition_penalty", "1.3")
    with start(*words, warm=warm) as process:
        assert process.stdout.read(8)  # it is running
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "\n")


@pytest.mark.parametrize("words", [["complete", "{name}", "A long story:"], ["info", "{name}"]], ids=["complete", "info"])
def test_a_reader_that_goes_away_is_141(name, words):
    reader, writer = os.pipe()
    os.close(reader)
    with start(*[word.format(name=name) for word in words], stdout=writer) as process:
        os.close(writer)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_disk_is_1(name):
    with Path("/dev/full").open("w") as full, start("info", name, "--json", stdout=full) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.startswith("llama-ref: cannot write the output: No space left on device; ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_an_error_keeps_its_exit_code_when_lines_before_it_cannot_be_written(warm):
    code = """
        import sys
        from llama_ref.cli.outcome import guarded
        from llama_ref.errors import CheckpointError
        def action():
            print("a line, which is written at the end")
            raise CheckpointError("it is damaged")
        sys.exit(guarded(action))
    """
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([warm / "python", "-c", textwrap.dedent(code)], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "llama-ref: it is damaged\n")


def test_letters_that_cannot_be_shown_end_nothing(name):
    words = ("complete", name, "--max_gen_len", "1", "--temperature", "0", "--echo")
    done = subprocess.run(
        [sys.executable, "-m", "llama_ref.cli", *words],
        input="caf\xe9 한".encode(),
        env=os.environ | {"PYTHONIOENCODING": "ascii:strict"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.startswith(b"caf") and done.stdout.isascii()
    assert re.fullmatch(PACE, done.stderr.decode())


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_streams_that_the_shell_closed_end_nothing(closed):
    command = f'exec "$0" -m llama_ref.cli list --json {closed}'
    done = subprocess.run(["bash", "-c", command, sys.executable], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# ---- python -OO


@pytest.mark.parametrize("words", ["--help", "complete --help", "list", "info tiny"])
def test_without_docstrings_and_asserts_everything_is_said_all_the_same(run, root, words):
    tiny_folder(root / "tiny")
    command = [sys.executable, "-OO", "-m", "llama_ref", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == run(*words.split())


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "A", "B", "--to", "hf"),
        ("reshard", "A", "B", "--shards", "2"),
        ("quantize", "A", "B", "--to", "int8"),
        ("checksum", "A"),
    ],
    ids=lambda words: words[0],
)
def test_a_command_that_writes_files_is_refused_in_several_processes(run, monkeypatch, words):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(*words) == (2, "", "llama-ref: 2 processes would write the same files: start it without torchrun\n")
