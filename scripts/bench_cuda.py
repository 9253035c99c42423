"""Measure and check this project on a GPU: speed, memory, agreement with the CPU and transformers.

    python scripts/bench_cuda.py [--device cuda] [--only bf16,quant] [--total 470] [--out DIR] [--rehearse]

Each stage runs in its own process with a time limit, the most valuable first, all within --total
seconds. Each figure is printed at once and appended as a line of JSON to DIR/results.jsonl (default:
$OUT, or a new temporary folder). A failure is one line here and a traceback in DIR/errors.txt; the
next measurement follows. A summary comes last.

    env          versions, the attention backend of each call, speed of copies, reads and products
    tests        the tests marked `cuda`
    parity       1B shape, 4 layers: against transformers, a prompt in chunks, compiled against eager
    bf16         the largest release that fits: prefill and decode, eager and compiled, up to 128k tokens
    small        the same for the 1B
    quant        int8 and int4: quantizing, memory, prefill, decode, kernels against float32
    batch        8, 32 and 128 sequences
    peer         transformers on the same GPU: prefill, eager and compiled decode
    first_token  time from ids to the first token
    speculate    passes over several tokens, in decode steps: the numbers of PassTime
    images       the 11B vision release: its encoder, and text after an image
    load         reading a checkpoint onto the GPU, plain and quantized
    memory       memory of CUDA, a model and its graphs, against what `llama-ref plan` predicts

`env` always runs: the others need its bandwidth. No checkpoint is needed: models get random
weights, in the shape of the 8B, 3B or 1B, the largest that fits. The data type is bfloat16, or
float16 on GPUs before Ampere. --rehearse runs everything in toy shapes on the CPU. Exit code 1 if
anything failed.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch

import cuda_stages
from cuda_figures import Run, figures_line, write_figures
from llama_ref.cli.parsing.flags import Flag
from llama_ref.cli.parsing.parser import EXIT_BAD, command, run
from llama_ref.errors import RequestError

STAGES = {  # seconds at most, most valuable first
    "env": 40,
    "tests": 120,
    "parity": 50,
    "bf16": 130,
    "small": 40,
    "quant": 110,
    "batch": 80,
    "peer": 90,
    "first_token": 40,
    "speculate": 50,
    "images": 40,
    "load": 90,
    "memory": 50,
}
EXIT_TERMINATED = 143
LEAST_SECONDS = 15  # with less time left, a stage is skipped


@command()
def main(
    *,
    device: Annotated[str, Flag("cuda or cpu")] = "cuda",
    rehearse: Annotated[bool, Flag("toy shapes on the CPU")] = False,
    only: Annotated[str | None, Flag("stages, separated by commas", unset="all")] = None,
    total: Annotated[float, Flag("seconds for all stages together")] = 470.0,
    out: Annotated[
        str | None,
        Flag("folder for results.jsonl, errors.txt and profiles", unset="a temporary one"),
    ] = None,
    stage: Annotated[str | None, Flag("used by the script itself")] = None,
    deadline: Annotated[float, Flag("used by the script itself")] = 0.0,
) -> int:
    """Measure decoding on a GPU, each stage in its own process."""
    device = "cpu" if rehearse else device
    if stage:
        return _measure(stage, device, rehearse, Path(out or "."), deadline)
    chosen = _choose_stages(only)
    _check_device(device)
    folder = _new_folder(out)
    if rehearse:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # a rehearsal skips compiling, the slowest part
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))  # so that a running stage is stopped as well
    start = time.time()
    with tempfile.TemporaryDirectory(prefix="llama-ref-inductor-", ignore_cleanup_errors=True) as scratch:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", scratch)  # shared by the stages, empty at first
        try:
            for name in chosen:
                _run_stage(name, device, rehearse, folder, start, start + total)
        finally:
            _print_summary(folder)
    return EXIT_BAD if (folder / "errors.txt").exists() else 0


def _choose_stages(only: str | None) -> list[str]:
    names = list(STAGES) if only is None else ["env", *only.replace(" ", "").split(",")]
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise RequestError(f"unknown stage {unknown[0]!r}; the stages are {', '.join(STAGES)}")
    return [name for name in STAGES if name in names]


def _check_device(device: str) -> None:
    """Raise RequestError for a device that is not available, before any stage starts."""
    if device not in ("cuda", "cpu"):
        raise RequestError(f"device is {device!r}, expected cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise RequestError("there is no CUDA device here; try --device cpu, or --rehearse")


def _new_folder(out: str | None) -> Path:
    """Create the folder for the figures. Raises RequestError if it has those of another run."""
    out = out or os.environ.get("OUT")
    if out is None:
        return Path(tempfile.mkdtemp(prefix="llama-ref-bench-cuda-"))
    folder = Path(out).expanduser().resolve()
    if any((folder / name).exists() for name in ("results.jsonl", "errors.txt")):
        raise RequestError(f"{folder} has the figures of another run; name another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run_stage(name: str, device: str, rehearse: bool, folder: Path, start: float, end: float) -> None:
    """Run a stage in its own process; kill it and its children at its limit."""

    def say(what: str, **figures: float) -> None:
        write_figures(folder, name, what, time.time() - start, **figures)

    left = end - time.time()
    if left < LEAST_SECONDS:
        return say("skipped, too late", seconds_left=left)
    limit = min(STAGES[name], left)
    words = [f"--stage={name}", f"--device={device}", f"--out={folder}", f"--deadline={time.time() + limit}"]
    command = [sys.executable, "-u", __file__, *words, *(["--rehearse"] if rehearse else [])]
    started = time.time()
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return say("stopped at its limit", seconds=limit)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        with (folder / "errors.txt").open("a") as file:
            file.write(f"== {name}: its process ended with {code}\n")
        return say("FAILED", process_ended_with=code)
    return say("took", seconds=time.time() - started)


def _measure(stage: str, device: str, rehearse: bool, folder: Path, deadline: float) -> int:
    """Run one stage in this process."""
    run_ = Run(stage, device, rehearse, folder, deadline)
    with run_.attempt("stage"):
        getattr(cuda_stages, stage)(run_)
    return 0


def _print_summary(folder: Path) -> None:
    print(f"\nsummary of {folder}")
    file = folder / "results.jsonl"
    for line in map(json.loads, file.read_text().splitlines() if file.exists() else ()):
        print(figures_line(line.pop("stage"), line.pop("what"), line))
    if (folder / "errors.txt").exists():
        print(f"failures: {folder / 'errors.txt'}")


if __name__ == "__main__":
    sys.exit(run(main))
