"""Measure sampling, loading and compiling: everything but a model's forward passes.

    python scripts/bench_parts.py [--ckpt_dir checkpoints/SmolLM2-135M-Instruct] [--quantize int8] [--rounds 50] [--json]

Each part runs in its own process, with the folder's files in the page cache.

    sampling   ms per token at temperature 0.6 and top_p 0.9 over 128,256 logits: peaked like a trained
               model's, and flat like those of random weights; against Meta's reference, which sorts
               all
    loading    seconds for imports and until the model is ready; peak memory while loading and after
               three tokens, mapped files included, as a share of the weights' bytes; without a
               check of checklist.chk, with it, and with it after an earlier process has checked
    compiling  seconds with an empty cache of PyTorch's compiler, and again with a filled one
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from rich import box
from rich.table import Table

from llama_ref.cli.parsing.flags import Flag
from llama_ref.cli.parsing.parser import command, run
from llama_ref.cli.shared.options import Json, Name, Quantize
from llama_ref.errors import LlamaRefError

VOCAB_SIZE, TEMPERATURE, TOP_P = 128_256, 0.6, 0.9
STEEPNESS = 1.5  # of the peaked logits: that of rank n is -1.5 · log n
N_TOKENS = 3


@command()
def main(
    ckpt_dir: Name = "checkpoints/SmolLM2-135M-Instruct",
    *,
    quantize: Quantize = None,
    rounds: Annotated[int, Flag("number of measurements of each part")] = 50,
    json: Json = False,
    part: Annotated[str | None, Flag("used by the script itself")] = None,
) -> None:
    """Measure all parts, each in its own process."""
    settings = {"ckpt_dir": ckpt_dir, "quantize": quantize, "rounds": rounds}
    if part:
        print(_to_json(PARTS[part](**settings)))
        return
    _cache_files(Path(ckpt_dir))
    with tempfile.TemporaryDirectory(prefix="llama-ref-parts-") as scratch:
        own_cache = {"TORCHINDUCTOR_CACHE_DIR": scratch}
        figures = {
            "sampling": _measure("sampling", settings),
            "loading, verify=never": _measure("load_unverified", settings),
            "loading, verify=auto, first time": _measure("load_verified", settings, {"XDG_CACHE_HOME": scratch}),
            "loading, verify=auto, again": _measure("load_verified", settings, {"XDG_CACHE_HOME": scratch}),
            "compiling, cold": _measure("compiling", settings, own_cache),
            "compiling, warm": _measure("compiling", settings, own_cache),
        }
    if json:
        print(_to_json(figures))
    else:
        _print_table(figures)


def _to_json(figures: dict[str, Any]) -> str:
    return json.dumps(figures, indent=None if "sampling" not in figures else 2)


def _cache_files(folder: Path) -> None:
    """Read the files into the page cache."""
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def _measure(part: str, settings: dict[str, Any], changes: dict[str, str] | None = None) -> dict[str, float]:
    """A part's figures, measured in its own process. Raises LlamaRefError if that fails."""
    words = [f"--{name}={value}" for name, value in settings.items() if value is not None]
    command = [sys.executable, __file__, *words, f"--part={part}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ | (changes or {}), check=False, text=True)
    if done.returncode:
        raise LlamaRefError(f"{part} could not be measured: its process ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- the parts, each in its own process


def sampling(rounds: int, **_: Any) -> dict[str, float]:
    """Milliseconds per token, in alternating rounds."""
    import torch

    from llama_ref.sampling import Sampler, SamplingParams

    generator = torch.Generator().manual_seed(0)
    ranks = torch.randperm(VOCAB_SIZE, generator=generator) + 1
    kinds = {"peaked": -STEEPNESS * ranks.log()[None], "flat": 0.1 * torch.randn(1, VOCAB_SIZE, generator=generator)}
    sampler = Sampler(SamplingParams(temperature=TEMPERATURE, top_p=TOP_P), generator, [[]], VOCAB_SIZE)

    def sort_all(logits: torch.Tensor) -> torch.Tensor:
        probs, ids = torch.softmax(logits / TEMPERATURE, dim=-1).sort(dim=-1, descending=True)
        probs[probs.cumsum(-1) - probs > TOP_P] = 0
        return ids.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]

    methods: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"": sampler, ", all sorted": sort_all}
    times: dict[str, list[float]] = {f"{kind}{method} ms": [] for kind in kinds for method in methods}
    for _ in range(rounds):
        for kind, logits in kinds.items():
            for method, choose in methods.items():
                start = time.perf_counter()
                choose(logits)
                times[f"{kind}{method} ms"].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def loading(verify: str) -> Callable[..., dict[str, float]]:
    def load(ckpt_dir: str, quantize: str | None, **_: Any) -> dict[str, float]:
        start = time.perf_counter()
        from llama_ref import Llama
        from llama_ref.bench.costs import weight_bytes
        from llama_ref.bench.machine import peak_bytes

        imported = time.perf_counter()
        before = _held_bytes()
        llama = Llama.build(ckpt_dir, device="cpu", quantize=quantize, verify=verify)
        ready, peak = time.perf_counter(), peak_bytes(llama.device)
        weights = weight_bytes(llama.model, llama.model)  # the embedding included
        llama.generate([[1] * N_TOKENS], N_TOKENS, temperature=0)
        return {
            "import s": imported - start,
            "ready s": ready - imported,
            "peak / weights": (peak - before) / weights,
            "peak in use / weights": (peak_bytes(llama.device) - before) / weights,
            "anonymous / weights": _held_bytes("RssAnon") / weights,
        }

    return load


def compiling(ckpt_dir: str, quantize: str | None, **_: Any) -> dict[str, float]:
    from llama_ref import Llama
    from llama_ref.compiled.cpu import compile_decode

    llama = Llama.build(ckpt_dir, device="cpu", quantize=quantize, verify="never")
    start = time.perf_counter()
    compile_decode(llama.model)
    return {"s": time.perf_counter() - start}


def _held_bytes(kind: str = "VmRSS") -> int:
    """This process's memory in bytes, or 0 if the system does not report it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(kind)), 0)


PARTS = {
    "sampling": sampling,
    "load_unverified": loading("never"),
    "load_verified": loading("auto"),
    "compiling": compiling,
}


def _print_table(figures: dict[str, dict[str, float]]) -> None:
    from llama_ref.cli.terminal import print_rich

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("part", no_wrap=True)
    table.add_column("figure")
    table.add_column("", justify="right")
    for part, found in figures.items():
        for i, (name, value) in enumerate(found.items()):
            table.add_row("" if i else part, name, f"{value:.2f}")
    print_rich(table)


if __name__ == "__main__":
    sys.exit(run(main))
