"""scripts/bench_cuda.py without a card: every stage in toy shapes, and what a failure leaves."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

import bench_cuda
from bench_cuda import STAGES, main
from cuda_figures import Run
from llama_ref.cli.parsing.parser import run


@pytest.fixture(autouse=True)
def own_environment(monkeypatch) -> Iterator[None]:
    """The script sets these for the processes it starts."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCHDYNAMO_DISABLE", "OUT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_every_stage_gives_figures(warm, tmp_path, monkeypatch):
    """All in this process: one per stage would take a minute more, and the next test starts two."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setattr(sys, "executable", str(warm / "python"))  # the pytest's of one stage
    for stage in STAGES:
        words = [f"--stage={stage}", "--rehearse", f"--out={tmp_path}", f"--deadline={time.time() + 1000}"]
        assert run(main, words) == 0
    assert not (tmp_path / "errors.txt").exists(), (tmp_path / "errors.txt").read_text()
    found = lines(tmp_path)
    for stage in STAGES:
        measured = [line for line in found if line["stage"] == stage and line["what"] not in ("took", "skipped, too late")]
        assert any(isinstance(value, float | int) for line in measured for value in line.values()), stage
    assert found[0]["what"] == "versions"
    assert found[0].keys() >= {"date", "commit", "card", "torch", "triton", "transformers", "dtype"}
    by_name = {(line["stage"], line["what"]): line for line in found}
    assert by_name["tests", "pytest -m cuda"]["returncode"] == 0
    for dtype in ("float32", "bfloat16"):
        bound = 1e-5 if dtype == "float32" else 0.03
        assert by_name["parity", f"transformers, {dtype}"]["relative_error"] < bound
        assert by_name["parity", f"in pieces, {dtype}"]["relative_error"] < bound
    step = by_name["bf16", "8B compiled decode after 1000"]
    assert step["tokens_s"] == pytest.approx(1000 / step["ms"], rel=0.01)
    assert step["percent_of_read"] == pytest.approx(100 * step["GB_s"] / by_name["env", "read bandwidth"]["GB_s"], rel=0.01)
    for scheme in ("int4", "int8"):
        quantized = by_name["quant", f"8B {scheme} compiled decode after 1000"]
        assert quantized["times_unquantized"] == pytest.approx(quantized["tokens_s"] / step["tokens_s"], rel=0.01)
        assert by_name["quant", f"{scheme} w1, 1 rows, beside float32"]["relative_error"] < 0.01
    assert by_name["peer", "8B transformers, static cache, compiled"]["tokens_as_eager"] == "4 of 4"
    assert (tmp_path / "profile_bf16_decode.txt").stat().st_size > 1000


def test_only_some_stages_and_the_bandwidth_they_need(warm, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "executable", str(warm / "python"))
    assert run(main, ["--rehearse", "--only", "load", "--out", str(tmp_path)]) == 0
    assert {line["stage"] for line in lines(tmp_path)} == {"env", "load"}
    assert "load" in capfd.readouterr().out.partition("summary of")[2]


def test_a_rehearsal_runs_no_compiler(warm, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "executable", str(warm / "python"))
    monkeypatch.setattr(bench_cuda, "STAGES", {"memory": 50})
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    assert run(main, ["--rehearse", "--out", str(tmp_path)]) == 0
    assert not list(tmp_path.glob("compiled/**/*.cpp"))


def test_a_stage_that_takes_too_long_is_stopped_and_the_next_begins(warm, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "executable", str(warm / "python"))
    monkeypatch.setattr(bench_cuda, "STAGES", {"env": 0.05, "load": 50})
    assert run(main, ["--rehearse", f"--out={tmp_path}"]) == 0
    assert [line["what"] for line in lines(tmp_path) if line["stage"] == "env"] == ["stopped at its limit"]
    assert lines(tmp_path)[-1]["stage"] == "load"


def test_a_total_that_is_used_up_skips_stages(tmp_path, capfd):
    assert run(main, ["--rehearse", "--total=10", f"--out={tmp_path}"]) == 0
    assert [line["what"] for line in lines(tmp_path)] == ["skipped, too late"] * len(STAGES)


def test_a_process_that_dies_is_a_failure(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(bench_cuda, "STAGES", {"env": 50})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert run(main, ["--rehearse", f"--out={tmp_path}"]) == 1
    assert "== env: its process ended with 1" in (tmp_path / "errors.txt").read_text()


def test_a_run_that_is_terminated_leaves_no_process(tmp_path):
    words = ["--rehearse", "--only", "memory", "--out", str(tmp_path)]
    process = subprocess.Popen([sys.executable, bench_cuda.__file__, *words], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()  # the first figure: a stage is running
    stages = psutil.Process(process.pid).children(recursive=True)
    assert stages
    process.terminate()
    told, _ = process.communicate(timeout=60)
    assert process.returncode == bench_cuda.EXIT_TERMINATED
    assert f"summary of {tmp_path}" in told
    assert not [stage for stage in stages if stage.is_running()]


def test_a_failed_measurement_is_a_line_and_a_traceback(tmp_path, capfd):
    stage = Run("quant", "cpu", True, tmp_path, time.time() + 60)
    with stage.attempt("kernel"):
        raise RuntimeError("no kernel\nfor this card")
    with stage.attempt("next"):
        stage.say("next", ms=1.23456)
    failed, after = lines(tmp_path)
    assert failed == {"stage": "quant", "what": "kernel FAILED", "error": "RuntimeError: no kernel"}
    assert after == {"stage": "quant", "what": "next", "ms": 1.235}
    told = (tmp_path / "errors.txt").read_text()
    assert told.startswith("== quant: kernel\nTraceback")
    assert "for this card" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rehearse", "--only", "env,bf61"], "unknown stage 'bf61'; the stages are env, tests"),
        (["--device", "mps"], "device is 'mps', expected cuda or cpu"),
    ],
)
def test_misuse_is_told_before_anything_runs(tmp_path, capfd, words, message):
    assert run(main, [*words, "--out", str(tmp_path)]) == 2
    assert message in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_figures_of_another_run_are_kept(tmp_path, capfd):
    (tmp_path / "results.jsonl").write_text("{}\n")
    assert run(main, ["--rehearse", "--out", str(tmp_path)]) == 2
    assert "has the figures of another run" in capfd.readouterr().err
    assert (tmp_path / "results.jsonl").read_text() == "{}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_options_a_card_is_needed(monkeypatch, capfd):
    assert run(main, []) == 2
    assert "there is no CUDA device here; try --device cpu, or --rehearse" in capfd.readouterr().err
