"""`llama-ref plan`: tables, JSON, the start command, exit codes."""

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

import chat_completion
import text_completion
from conftest import REPOSITORY
from folders import tiny_folder
from llama_ref.cli import main
from llama_ref.formatting import human_bytes
from llama_ref.plan import SET_ASIDE

Run = Callable[..., tuple[int, str, str]]
SCRIPTS = {"scripts/chat_completion.py": chat_completion, "scripts/text_completion.py": text_completion}


@pytest.fixture
def run(capsys, monkeypatch, tmp_path) -> Run:
    """Run `llama-ref plan …` without releases; return (exit code, stdout, stderr)."""
    monkeypatch.setenv("LLAMA_MODELS_CONFIG_DIR", str(tmp_path / "llama"))

    def run(*words: object) -> tuple[int, str, str]:
        try:
            code = main(["plan", *map(str, words)])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


def planned(run: Run, *words: object) -> dict:
    code, out, _ = run(*words, "--json")
    parsed = json.loads(out)
    assert code == (0 if parsed["smallest"] else 1)
    return parsed


def rows(out: str) -> list[list[str]]:
    """Return the cells of a printed table, with units joined to their numbers."""
    numbered = [line for line in out.splitlines() if re.match(r" *\d+ +\d+ +\d+ ", line)]
    return [re.sub(r"(\d) ([kMGT]?B)\b", r"\1\2", line).split() for line in numbered]


def test_the_tables_say_what_the_json_says(run):
    code, out, err = run("Llama3.1-70B", "--gpu_memory", 80)
    assert (code, err) == (0, "")
    listed = {
        (row["dtype"], row["tensor_parallel_size"]): row for row in planned(run, "Llama3.1-70B")["layouts"] if one_stage(row)
    }
    assert len(rows(out)) == len(listed) == 10
    for dtype, cells in zip(["bfloat16"] * 5 + ["float32"] * 5, rows(out), strict=True):
        row = listed[dtype, int(cells[1])]
        sizes = ("weight_bytes", "kv_cache_bytes", "activation_bytes", "total_bytes")
        assert cells[3:7] == [human_bytes(row[size]).replace(" ", "") for size in sizes]
        assert cells[7] == ("yes" if row["fits"] else "no")
        assert row["total_bytes"] == sum(row[size] for size in sizes[:3]) + SET_ASIDE
    assert "bfloat16: 2 cards are enough\n" in out and "float32: 4 cards are enough\n" in out


def one_stage(row: dict) -> bool:
    return row["pipeline_parallel_size"] == 1


@pytest.mark.parametrize("name", ["Llama3.1-8B", "Llama3.1-405B", "Llama3.2-1B-Instruct:int4-spinquant-eo8"])
def test_tables_and_commands_are_no_wider_than_a_terminal(run, name):
    _, out, _ = run(name, "--gpu_memory", 80)
    prose = ("note:", "Sizes:", "Longest:", "bfloat16:", "float32:")
    lines = [line.rstrip() for line in out.splitlines() if not line.startswith(prose)]
    assert max(map(len, lines)) <= 80


def test_stages_are_shown_where_one_node_does_not_do(run):
    _, out, _ = run("Llama3.1-405B:bf16-mp8", "--dtype", "bf16", "--gpu_memory", 80)
    assert [cells[1:3] for cells in rows(out) if cells[2] != "1"] == [["8", "2"], ["8", "4"], ["8", "8"]]
    assert "16 cards are enough, in 2 stages" in out
    _, out, _ = run("Llama3.1-405B:bf16-mp8", "--dtype", "bf16", "--gpu_memory", 141)
    assert {cells[2] for cells in rows(out)} == {"1"}


@pytest.mark.parametrize(
    ("words", "script", "expected"),
    [
        (("Llama3.1-8B-Instruct", "--gpu_memory", 24), "chat", {}),
        (("Llama3.1-70B", "--max_batch_size", 8), "text", {"nproc_per_node": "2"}),
        (("Llama3.1-70B", "--dtype", "fp32"), "text", {"nproc_per_node": "4"}),
        (("Llama3.1-405B-Instruct:bf16-mp8",), "chat", {"nnodes": "2", "nproc_per_node": "8", "rdzv_endpoint": "HOST:29500"}),
    ],
)
def test_the_command_is_one_that_torchrun_and_the_script_take(run, words, script, expected):
    best = planned(run, *words)["smallest"]
    arguments = parse_args(shlex.split(best["command"])[1:])
    assert arguments.training_script == f"scripts/{script}_completion.py"
    assert {key: getattr(arguments, key) for key in expected} == expected
    assert int(arguments.nnodes.split(":")[-1]) * int(arguments.nproc_per_node) == best["processes"]
    given = arguments.training_script_args
    flags = dict(zip([flag.removeprefix("--") for flag in given[::2]], given[1::2], strict=True))
    assert set(flags) <= SCRIPTS[arguments.training_script].main.parameters.keys()
    assert int(flags.get("pipeline_parallel_size", 1)) == best["pipeline_parallel_size"]
    assert flags.get("dtype", "bfloat16") == best["dtype"]


def test_the_command_runs(warm, run, tmp_path):
    folder = tiny_folder(tmp_path / "a folder's name")
    _, out, _ = run(folder, "--max_seq_len", 200)
    command = out[out.index("torchrun") :].split("\n\n")[0].replace("torchrun", str(warm / "torchrun"), 1)
    done = subprocess.run(
        ["bash", "-c", f"{command} --max_gen_len 1 --device cpu"], capture_output=True, text=True, check=False, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr
    assert "I believe the meaning of life is" in done.stdout


def test_fewer_bits_take_fewer_cards_and_the_command_says_how(run):
    code, out, _ = run("Llama3.1-70B", "--gpu_memory", 24, "--quantize", "int4")
    assert code == 0 and "int4, computed in bfloat16" in out and "float32" not in out
    assert "bfloat16: 2 cards are enough\n" in out or "bfloat16: 4 cards are enough\n" in out
    assert "--quantize int4\n" in out
    found = planned(run, "Llama3.1-70B", "--gpu_memory", 24, "--quantize", "int4", "--dtype", "float16")
    assert found["quantization"] == "int4" and found["smallest"]["command"].endswith("--quantize int4 --dtype float16")


def test_nothing_fits_and_what_would(run):
    code, out, err = run("Llama3.1-405B", "--gpu_memory", 4)
    assert (code, err) == (1, "")
    assert "nothing fits: even 128 processes need" in out and "a smaller max_seq_len or max_batch_size does not help" in out
    assert "torchrun" not in out
    code, out, _ = run("Llama3.1-8B", "--gpu_memory", 3, "--max_batch_size", 32, "--max_seq_len", 131072, "--dtype", "bf16")
    assert code == 1
    advised = re.search(r"(--max_batch_size \d+ --max_seq_len \d+) would fit", out)
    code, _, _ = run("Llama3.1-8B", "--gpu_memory", 3, *advised[1].split(), "--dtype", "bf16")
    assert code == 0


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (("Llama-3-8B", "--max_seq_len", 8193), r"trained for 8,192 tokens and cannot use more; --max_seq_len asks for 8,193"),
        (("Llama3.1-8B", "--max_batch_size", 1), r"4 prompts at a time, which --max_batch_size 1 rejects"),
        (("Llama3.1-8B",), r"tensor above 8"),
    ],
)
def test_notes(run, words, note):
    _, out, _ = run(*words)
    assert re.search(f"^note: .*{note}", out, re.MULTILINE)
    assert any(re.search(note, line) for line in planned(run, *words)["notes"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nonsense",), "no checkpoint at nonsense"),
        (("Llama3.1-8c",), r"did you mean Llama3\.1-8B"),
        (("Llama-Guard-3-1B:int4",), "is an ExecuTorch program"),
        (("Llama3.1-8B", "--gpu_memory", "0"), "gpu_memory is 0"),
        (("Llama3.1-8B", "--gpu_memory", "80GB"), "gpu_memory is '80GB'"),
        (("Llama3.1-8B", "--gpu_memory"), "--gpu_memory needs a value: --gpu_memory NUMBER"),
        (("Llama3.1-8B", "--gpu_memory", "1e999"), "gpu_memory is inf"),
        (("Llama3.1-8B", "--max_seq_len", "8k"), "max_seq_len is '8k'"),
        (("Llama3.1-8B", "--max_seq_len", "9" * 4000), "max_seq_len is 9+"),
        (("Llama3.1-8B", "--max_batch_size", "-1"), "max_batch_size is -1"),
        (("Llama3.1-8B", "--dtype", "int4"), "--dtype is 'int4', expected bfloat16, float16 or float32"),
        (("Llama3.1-8B", "--quantize", "int2"), "quantize is 'int2', expected int8, int4"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_misuse_is_one_line_and_2(run, words, message):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert re.match(f"llama-ref: .*{message}", err) and err.count("\n") == 1 and len(err) < 1200


def test_a_damaged_folder_is_1(run, tmp_path):
    folder: Path = tiny_folder(tmp_path / "broken")
    (folder / "params.json").write_text('{"dim": "wide"}')
    code, out, err = run(folder)
    assert (code, out) == (1, "")
    assert "params.json" in err and err.count("\n") == 1


def test_a_hundred_million_heads_take_no_time(run, tmp_path):
    folder = tiny_folder(tmp_path / "wide")
    params = json.loads((folder / "params.json").read_text())
    params |= {"dim": 1 << 28, "n_heads": 1 << 27, "n_kv_heads": 1 << 27, "n_layers": 10_000, "hidden_dim": 1 << 28}
    del params["multiple_of"]
    (folder / "params.json").write_text(json.dumps(params))
    code, out, _ = run(folder, "--max_seq_len", 10**9, "--max_batch_size", 10**9)
    assert code == 1 and "nothing fits" in out
