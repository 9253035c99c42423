"""Compare `llama_ref.study` with nnsight and TransformerLens: time and extra memory of tasks.

    python -m venv /tmp/nnsight && /tmp/nnsight/bin/pip install -r scripts/study_peers/nnsight.txt
    python -m venv /tmp/lens && /tmp/lens/bin/pip install -r scripts/study_peers/transformer-lens.txt
    python scripts/bench_study.py --nnsight /tmp/nnsight/bin/python --transformer_lens /tmp/lens/bin/python

Each peer needs its own environment: both cannot share one with this package. A peer whose Python is
not given is left out. Each figure is the least of `--repeats` fresh processes; the contestants take
turns. All must find the same numbers. The default is one thread. On a busy machine, compare only
the CPU seconds, which are also shown. The peers run the same weights, converted to Hugging Face's
format, in float32 on the same tokens. `--only logit_lens,patterns` chooses tasks.

Peers do each task like a user who cares about speed: grids with all cells of a layer in one batch,
prompts padded to one length in passes of 10. Linux only.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fire
import torch

from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.writing.convert import to_hugging_face
from llama_ref.errors import LlamaRefError, RequestError
from llama_ref.tokenizer import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = REPOSITORY / "scripts" / "quality_texts" / "english.txt"
DEMO = REPOSITORY / "checkpoints" / "SmolLM2-135M-Instruct"
WORKER = REPOSITORY / "scripts" / "study_peers" / "worker.py"
TASKS = {
    "module_outputs": "outputs of all modules",
    "everything": "these and all attention patterns",
    "residual_grid": "grid of patched residuals",
    "head_grid": "grid of patched heads",
    "attribution": "both grids by one gradient each",
    "logit_lens": "logit lens, top 5 and entropy",
    "patterns": "attention patterns of prompts",
    "collect": "residuals of prompts to disk",
}
CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
NAMES = (" Mary", " John")
TOLERANCE = 1e-3  # relative, between the contestants' numbers


@dataclass(frozen=True)
class Figure:
    """The measurements of one process; `number` is the task's own result, to compare."""

    seconds: float
    cpu_seconds: float
    megabytes: float
    number: float


def main(
    folder: str | Path = DEMO,
    nnsight: str | None = None,
    transformer_lens: str | None = None,
    only: str | tuple[str, ...] = tuple(TASKS),
    repeats: int = 3,
    tokens: int = 200,
    prompts: int = 50,
    threads: int = 1,
) -> dict[str, dict[str, Figure]]:
    """Print a table of all tasks, and return it."""
    tasks = only.split(",") if isinstance(only, str) else only
    if unknown := [task for task in tasks if task not in TASKS]:
        raise RequestError(f"only has {unknown[0]!r}, expected some of {', '.join(TASKS)}")
    pythons = {"ours": sys.executable, "nnsight": nnsight, "transformer-lens": transformer_lens}
    pythons = {name: path for name, path in pythons.items() if path}
    if missing := [path for path in pythons.values() if not Path(str(path)).is_file()]:
        raise RequestError(f"{missing[0]} is not a file, expected the Python of the peer's environment")
    print(f"{tokens} tokens of text, {prompts} prompts, float32, {threads} threads, torch {torch.__version__}")
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}")
    print("seconds and extra megabytes, each the least of", repeats, "fresh processes; times ours\n", flush=True)
    table = {}
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "inputs.json"
        path.write_text(json.dumps(inputs(folder, Path(scratch), tokens, prompts, threads)), encoding="utf-8")
        for task in tasks:
            table[task] = measure(pythons, task, path, repeats)
            print(report(task, table[task]), flush=True)
    print(f"\nload of the machine after: {os.getloadavg()[0]:.1f}")
    return table


def inputs(folder: str | Path, scratch: Path, tokens: int, prompts: int, threads: int) -> dict[str, Any]:
    """The input of a worker: the two folders, ids, and the metric's tokens."""
    found = open_folder(folder)
    tokenizer = found.open_tokenizer(found.read_args())
    converted = folder if found.is_hugging_face else to_hugging_face(folder, scratch / "hf")
    words = TEXT.read_text(encoding="utf-8").split()
    starts = [i * 29 % (len(words) - 40) for i in range(prompts)]
    texts = [" ".join(words[start : start + 10 + i * 7 % 30]) for i, start in enumerate(starts)]
    target, other = (tokenizer.encode(name, bos=False, eos=False)[0] for name in NAMES)
    return {
        "folder": str(folder),
        "converted": str(converted),
        "text": encoded(tokenizer, " ".join(words))[:tokens],
        "clean": encoded(tokenizer, CLEAN),
        "corrupted": encoded(tokenizer, CORRUPTED),
        "target": target,
        "other": other,
        "prompts": [encoded(tokenizer, text) for text in texts],
        "threads": threads,
    }


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, bos=True, eos=False)


def measure(pythons: dict[str, str], task: str, path: Path, repeats: int) -> dict[str, Figure]:
    """The least of each figure; contestants take turns. Raises RequestError if numbers differ."""
    runs: dict[str, list[Figure]] = {name: [] for name in pythons}
    for _ in range(repeats):
        for name, python in pythons.items():
            runs[name].append(run(name, python, task, path))
    least = {name: Figure(*map(min, zip(*(vars(each).values() for each in own), strict=True))) for name, own in runs.items()}
    expected = least["ours"].number
    for name, figure in least.items():
        if abs(figure.number - expected) > TOLERANCE * abs(expected):
            raise RequestError(f"{task}: {name} finds {figure.number:.6g}, we {expected:.6g}: not the same task")
    return least


def run(name: str, python: str, task: str, path: Path) -> Figure:
    """Run a task in a fresh process. Raises RequestError with its last line if it fails."""
    settings = {
        "OMP_NUM_THREADS": str(json.loads(path.read_text())["threads"]),
        "OMP_WAIT_POLICY": "passive",  # on busy cores, threads that spin while they wait slow each other down
        "PYTHONPATH": str(REPOSITORY) if name == "ours" else "",
    }
    done = subprocess.run(
        [python, WORKER, name, task, path], env=os.environ | settings, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        raise RequestError(f"{name} could not run {task}: {last:.300}")
    return Figure(**json.loads(done.stdout))


def report(task: str, figures: dict[str, Figure]) -> str:
    ours = figures["ours"]
    lines = [TASKS[task]]
    for name, own in figures.items():
        line = f"  {name:17} {own.seconds:7.3f} s  {own.cpu_seconds:7.3f} s of CPU  {own.megabytes:6.0f} MB"
        if own is not ours:
            line += f"   {own.seconds / ours.seconds:.2f} ×, {own.cpu_seconds / ours.cpu_seconds:.2f} × CPU"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        fire.Fire(main, serialize=lambda result: None)
    except LlamaRefError as error:
        raise SystemExit(f"bench_study: {error}") from None
