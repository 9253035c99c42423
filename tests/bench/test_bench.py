"""`llama-ref bench`: contestants, computed costs, processes and output; no test asserts a speed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from folders import PARAMS, byte_tokenizer, tiny_folder
from llama_ref.bench import runner
from llama_ref.bench.costs import flops, weight_bytes
from llama_ref.bench.process import Failed, Process, session_seconds
from llama_ref.bench.results import LongResult, Machine, Report, Result, Spread, Work
from llama_ref.bench.roofline import draw_roofline
from llama_ref.bench.runner import compare
from llama_ref.bench.settings import OURS, PEERS, Settings
from llama_ref.cli import main
from llama_ref.cli.views.bench import WIDTH, print_report
from llama_ref.generation import Llama
from llama_ref.machine.busy import OtherPrograms, busy_seconds
from llama_ref.machine.cores import cpu_count
from llama_ref.quantization.apply import quantized_bytes
from make_random_checkpoint import make_random_checkpoint

SMALL = ("--prompt_len", "16", "--gen_len", "4", "--rounds", "1", "--batch", "1,2", "--threads", "1", "--device", "cpu")


def small_settings(folder: Path, **options) -> Settings:
    sizes = {"prompt_len": 16, "gen_len": 4, "batch": "1", "rounds": 1, "threads": 1}
    return Settings.parse(str(folder), **sizes | {"device": "cpu", "dtype": "float32"} | options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture(scope="module")
def report() -> Report:
    """A report whose names and numbers are as wide as possible."""
    settings = Settings(
        *("a/long/way/to/a/folder/" * 5, "int4:group=32", True, "cpu", "bfloat16", "auto", False, 512, 128),
        *((1, 128), (128, 131072), ("transformers", "llama.cpp", "meta"), 5, 128),
    )
    wide, ratio = Spread(12345.6, 10234.5, 98765.4), Spread(10.5, 0.05, 138.5)
    ours = Result(
        OURS,
        "int4:group=32, compiled",
        128,
        Spread(123.45, 123.45, 123.45),
        wide,
        wide,
        10**12,
        2.5e9,
        0.95,
        0.8,
        1.5e12,
        Work(2.5e9, 5e6),
        Work(2.5e9, 2.5e9),
        None,
        None,
        128,
    )
    long = [LongResult(context, wide, Work(2.5e9, 2.5e9), 1.5e9, 0.95, 0.5) for context in settings.contexts]
    theirs = [
        replace(ours, contestant=peer, precision="bfloat16", prefill_ratio=ratio, decode_ratio=ratio, matmul_fraction=None)
        for peer in settings.against
    ]
    machine = Machine("Linux x86_64", "A Processor With A Long Name (R) CPU @ 2.00GHz " * 2, 128, "cpu", {"torch": "2" * 90})
    notes = ["meta is left out: " + "word " * 40]
    return Report(machine, settings, settings.command, wide, [ours, *theirs], long, notes)


@pytest.fixture(scope="module")
def at_once(warm, tiny) -> tuple[dict, Report, float]:
    """Run two benchmarks at once.

    Returns one's JSON, and the other's report and own CPU seconds.
    """
    words = ["bench", str(tiny), *SMALL, "--dtype", "float32", "--against", "transformers,meta", "--context", "64,1", "--json"]
    program = (
        f"import sys; sys.executable = {str(warm / 'python')!r}; from llama_ref.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    counted = []

    class Watched(OtherPrograms):
        def hint(self, threads: int) -> str | None:
            counted.append(self._own())
            return super().hint(threads)

    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen([warm / "python", "-c", program, *words], stdout=subprocess.PIPE) as other,
    ):
        patch.setattr(runner, "OtherPrograms", Watched)
        found = compare(small_settings(tiny, quantize="int8", threads=cpu_count()))
        out, _ = other.communicate(timeout=240)
    assert other.returncode == 0
    return json.loads(out), found, counted[0]


@pytest.fixture(scope="module")
def printed(at_once) -> dict:
    return at_once[0]


@pytest.fixture(scope="module")
def disturbed(at_once) -> tuple[Report, float]:
    """The report of int8 weights, measured beside a busy program, and our own CPU seconds."""
    return at_once[1:]


class TestMeasuring:
    def test_all_take_their_turn_at_every_batch(self, printed):
        who = [(result["batch"], result["contestant"]) for result in printed["results"]]
        assert who == [(batch, name) for batch in (1, 2) for name in (OURS, "transformers", "meta")]
        assert printed["notes"] == []

    def test_all_run_the_same_model(self, printed):
        assert [result["same_tokens"] for result in printed["results"]] == [4] * 6
        for batch in (1, 2):  # the peers' bytes also include RoPE buffers
            read = [result["bytes_per_token"] for result in printed["results"] if result["batch"] == batch]
            assert max(read) < 1.01 * min(read)

    def test_only_others_have_a_ratio_and_only_ours_its_products(self, printed):
        for result in printed["results"]:
            is_ours = result["contestant"] == OURS
            assert (result["prefill_ratio"] is None, result["decode_ratio"] is None) == (is_ours, is_ours)
            assert (result["matmul_fraction"] is not None) == is_ours
            assert result["first_token"]["low"] > 0 < result["peak_bytes"]
            assert result["bandwidth_fraction"] > 0

    def test_machine_versions_and_command_are_told(self, printed):
        assert {"Python", "torch", "llama-ref", "transformers", "llama_models"} <= printed["machine"]["versions"].keys()
        assert printed["bandwidth"]["median"] > 0
        assert printed["command"].startswith("llama-ref bench ")
        assert "--batch 1,2 --context 1,64 --against transformers,meta --rounds 1 --threads 1" in printed["command"]

    def test_a_longer_context_reads_its_keys_and_values_more(self, printed):
        short, long = printed["long_results"]
        assert (short["context"], long["context"]) == (1, 64)
        per_token = 2 * PARAMS["n_layers"] * PARAMS["dim"] * 4  # equal numbers of key and query heads, in float32
        assert long["work"]["bytes"] - short["work"]["bytes"] == long["kv_bytes"] - short["kv_bytes"] == 63 * per_token
        assert short["growth_fraction"] is None
        assert min(short["decode"]["low"], long["decode"]["low"], long["bandwidth_fraction"]) > 0

    @pytest.mark.parametrize("quantize", [None, "int8", "int4:group=32"])
    def test_llama_cpp_runs_the_same_weights(self, quantize, tmp_path):
        pytest.importorskip("llama_cpp")
        folder = make_random_checkpoint(
            tmp_path / "scaled", PARAMS | {"use_scaled_rope": True, "n_kv_heads": 2}, tokenizer=byte_tokenizer(tmp_path / "t")
        )
        found = compare(small_settings(folder, against="llama.cpp", quantize=quantize, batch="1,3"))
        assert found.notes == []
        theirs = [result for result in found.results if result.contestant == "llama.cpp"]
        assert {result.precision for result in theirs} == {{None: "F32", "int8": "Q8_0", "int4:group=32": "Q4_0"}[quantize]}
        if quantize is None:
            assert [result.same_tokens for result in theirs] == [4, 4]

    def test_products_count_as_pytorch_counts_them(self, tiny, printed):
        llama = Llama.build(tiny, device="cpu", dtype="float32")
        args = llama.model.args
        with FlopCounterMode(display=False) as counted, torch.inference_mode():
            llama.model(torch.ones(1, 16, dtype=torch.long))
        counts = counted.flop_counts["Global"].items()
        assert flops(args, 16, 0, 16) == sum(n for kind, n in counts if "attention" not in str(kind))
        assert flops(args, 16, 256, 16) - flops(args, 16, 0, 16) == 4 * args.n_layers * args.dim * 256
        work = next(result["decode_work"] for result in printed["results"] if result["batch"] == 1)
        assert work["flops"] == flops(args, 1, 16 + 4 / 2, 1)

    def test_what_is_quantized_or_compiled_says_so(self, tiny, disturbed):
        found, _ = disturbed
        assert found.results[0].precision == "int8"
        assert "--quantize int8 --device" in found.command
        assert "--quantize int4 --compile --device" in small_settings(tiny, quantize="int4", compile=True).command

    @pytest.mark.skipif(busy_seconds() == 0 or cpu_count() == 1, reason="only Linux counts them, and one core has no other")
    def test_other_programs_are_noted_and_our_own_processes_are_none(self, disturbed):
        found, own_seconds = disturbed
        (note,) = found.notes
        assert re.fullmatch(r"other programs used \d+\.\d of \d+ cores during this run: try --threads \d+", note)
        assert own_seconds > time.process_time() + 1  # two workers imported PyTorch

    @pytest.mark.skipif(busy_seconds() == 0, reason="only Linux counts them")
    def test_what_a_process_starts_counts_as_its_own(self):
        work = "import time\nwhile time.process_time() < 0.4: pass\n"
        script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}]); print(flush=True); input()"
        pipe = subprocess.PIPE
        with subprocess.Popen([sys.executable, "-c", script], start_new_session=True, stdin=pipe, stdout=pipe) as process:
            process.stdout.readline()
            assert 0.4 <= session_seconds(process.pid) < 10
            process.communicate(b"\n")


class TestBytes:
    @pytest.mark.parametrize("tied", [False, True])
    def test_the_embedding_counts_only_where_it_is_the_output(self, tied, tmp_path):
        model = Llama.build(tiny_folder(tmp_path / "m", tied=tied), device="cpu", dtype="bfloat16").model
        parameters = {p.data_ptr(): p.numel() for p in model.parameters()}
        whole = 2 * sum(parameters.values())
        embedding = model.tok_embeddings.weight.nbytes
        assert weight_bytes(model, model.tok_embeddings) == (whole if tied else whole - embedding)

    @pytest.mark.parametrize("tied", [False, True])
    def test_quantized_matrices_count_as_they_lie_in_memory(self, tied, tmp_path):
        model = Llama.build(tiny_folder(tmp_path / "m", tied=tied), device="cpu", dtype="bfloat16", quantize="int8").model
        norms = sum(p.nbytes for p in model.parameters())
        embedding = 0 if tied else model.tok_embeddings.quantized_bytes
        assert weight_bytes(model, model.tok_embeddings) == quantized_bytes(model) + norms - embedding


class TestProcesses:
    def test_who_waits_sleeps(self, tiny, tmp_path):
        process = Process(OURS, 2, tmp_path)
        try:
            process.ask("load", settings=asdict(small_settings(tiny, threads=2)), scratch=str(tmp_path))
            process.ask("generate", prompts=[[1] * 64], gen_len=4)
            known = psutil.Process(process.process.pid)
            before = sum(known.cpu_times()[:2])
            time.sleep(0.5)
            assert sum(known.cpu_times()[:2]) - before <= 0.1
        finally:
            process.end()

    def test_one_that_is_killed_is_told(self, tmp_path):
        process = Process("bandwidth", 1, tmp_path)
        os.kill(process.process.pid, signal.SIGKILL)
        with pytest.raises(Failed, match="ended by signal SIGKILL"):
            process.ask("read")
        process.end()

    def test_one_that_cannot_start_says_why_in_a_line(self, warm, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "executable", str(warm / "python"))
        process = Process("nobody", 1, tmp_path)
        with pytest.raises(Failed, match=r"^KeyError: 'nobody'$"):
            process.ask("load", settings=asdict(small_settings(tiny_folder(tmp_path / "t"))), scratch="")
        process.end()

    def test_a_peer_that_fails_is_left_out_and_the_others_go_on(self, warm, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(sys, "executable", str(warm / "python"))
        pruned = {key: value for key, value in PARAMS.items() if key != "multiple_of"} | {"hidden_dim": 64}
        folder = make_random_checkpoint(tmp_path / "pruned", pruned, tokenizer=byte_tokenizer(tmp_path / "t"))
        assert main(["bench", str(folder), *SMALL, "--against", "meta,transformers"]) == 0
        out = capsys.readouterr().out
        assert "note: meta is left out: " in out
        assert "\n transformers" in out

    def test_a_peer_that_is_not_installed_is_noted(self, warm, tiny, monkeypatch, capsys):
        monkeypatch.setattr(sys, "executable", str(warm / "python"))
        monkeypatch.setitem(PEERS, "meta", (("no_such_module",), "pip install it"))
        assert main(["bench", str(tiny), *SMALL, "--against", "meta"]) == 0
        assert "note: meta is left out: no_such_module not installed (pip install it)" in capsys.readouterr().out

    def test_our_own_misuse_is_misuse(self, tiny, capsys):
        assert main(["bench", str(tiny), *SMALL, "--verify", "sometimes"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("llama-ref: ")
        assert len(err.splitlines()) == 1

    def started(self, program: Sequence[str | Path], folder: Path, scratch: Path, *words: str) -> subprocess.Popen:
        command = [*program, "bench", folder, *SMALL, *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=os.environ | {"TMPDIR": str(scratch)}, start_new_session=True, **pipes)

    def test_ctrl_c_ends_all_and_leaves_nothing(self, tiny, tmp_path):
        program = [sys.executable, "-m", "llama_ref.cli"]
        job = self.started(program, tiny, tmp_path, "--rounds", "1000", "--prompt_len", "512")
        parent, children, deadline = psutil.Process(job.pid), [], time.monotonic() + 300
        while len(children) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
            children = parent.children(recursive=True)
        job.send_signal(signal.SIGINT)
        _, err = job.communicate(timeout=300)
        assert job.returncode == 130, err
        assert len(children) == 2
        assert psutil.wait_procs(children, timeout=300)[1] == []
        assert list(tmp_path.glob("llama-ref-bench-*")) == []

    def test_a_reader_that_goes_away_is_no_error(self, warm, tiny, tmp_path):
        code = f"import sys; sys.executable = {str(warm / 'python')!r}; from llama_ref.cli import main; sys.exit(main())"
        job = self.started([warm / "python", "-c", code], tiny, tmp_path)
        job.stdout.close()
        assert (job.wait(timeout=300), job.stderr.read()) == (141, b"")


class TestShowing:
    def test_no_line_is_wider_than_a_terminal(self, report, capsys):
        print_report(report, as_json=False)
        lines = capsys.readouterr().out.splitlines()
        assert [line.rstrip() for line in lines if len(line.rstrip()) > WIDTH and " " in line.strip()] == []
        for name in (OURS, *PEERS):
            assert sum(line.startswith(f" {name} ") for line in lines) == 2
        assert any(line.split()[:1] == ["131,072"] for line in lines)

    def test_json_is_the_report(self, report, capsys):
        print_report(report, as_json=True)
        assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(asdict(report)))

    def test_settings_survive_their_way_to_a_process(self, report):
        assert Settings.from_json(json.loads(json.dumps(asdict(report.settings)))) == report.settings

    @pytest.mark.parametrize("has_bandwidth", [True, False])
    def test_the_roofline_is_a_picture_with_every_point_named(self, has_bandwidth, report, tmp_path):
        pytest.importorskip("matplotlib")
        shown = report if has_bandwidth else replace(report, bandwidth=None, results=report.results[1:], long_results=[])
        draw_roofline(shown, tmp_path / "roof.png")
        draw_roofline(shown, tmp_path / "roof.svg")
        assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")
        text = (tmp_path / "roof.svg").read_text()
        assert ("memory read at" in text, "context 131,072: " in text) == (has_bandwidth, has_bandwidth)
        for result in shown.results:
            assert text.count(f"<!-- {result.contestant}, batch 128: ") == 2  # decode and prefill


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--batch", "1,x"), "batch is '1,x', expected numbers"),
        (("--batch", "0"), "batch is '0', expected numbers"),
        (("--batch", "1,,8"), "batch is '1,,8', expected numbers"),
        (("--context", "8k"), "context is '8k', expected numbers from 1 to 8,192, like 8192,32768"),
        (("--context", "128,9000"), "9000"),
        (("--context", "16,8190"), "context 8,190 + gen_len 4 tokens exceed the model's context of 8,192"),
        (("--batch", "99999"), "batch is '99999', expected numbers"),
        (("--prompt_len", "0"), "prompt_len is 0, expected a whole number from 1"),
        (("--prompt_len", "many"), "prompt_len is 'many', expected a whole number"),
        (("--gen_len", "1"), "gen_len is 1, expected a whole number from 2"),
        (("--rounds", "0.5"), "--rounds is '0.5', expected a whole number"),
        (("--threads", "-1"), "--threads is '-1', expected a whole number from 1"),
        (("--prompt_len", "8190"), "prompt_len 8,190 + gen_len 4 tokens exceed the model's context of 8,192"),
        (("--against", "llama"), "against is 'llama', expected one or more of transformers,llama.cpp,meta"),
        (("--quantize", "int3"), "quantize is 'int3', expected int8"),
        (("--dtype", "int8"), "--dtype is 'int8', expected bfloat16"),
        (("--png", "picture"), "png is 'picture', expected a file that ends in .png"),
        (("--png", "/no/such/folder/a.png"), "there is no folder /no/such/folder: make it first"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_loaded(words, message, tiny, capsys):
    assert main(["bench", str(tiny), *SMALL, *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("llama-ref: ")
    assert message in err


def test_a_folder_that_is_none_is_refused(tmp_path, capsys):
    assert main(["bench", str(tmp_path), *SMALL]) != 0
    assert capsys.readouterr().err.startswith("llama-ref: ")
