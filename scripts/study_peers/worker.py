"""Run one task of one contestant in this process, and print its figures as JSON.

    PYTHON worker.py CONTESTANT TASK INPUTS.json

PYTHON is the contestant's own. Before the measured run the task runs on shorter inputs, so that
imports and one-time setup do not count. Extra memory is the peak of resident pages minus those
before the run, after freed pages were returned to the system; it includes what the task returns.
"""

import ctypes
import gc
import importlib
import json
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CONTESTANTS = {  # name: (module beside this file, class)
    "ours": ("ours", "Ours"),
    "nnsight": ("with_nnsight", "Nnsight"),
    "transformer-lens": ("with_transformer_lens", "Lens"),
}
SHORT = 8  # tokens of the inputs to warm up


def main(contestant: str, task: str, path: str) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    inputs = json.loads(Path(path).read_text(encoding="utf-8"))
    import torch

    torch.set_num_threads(inputs["threads"])
    module, name = CONTESTANTS[contestant]
    kind = getattr(importlib.import_module(module), name)
    with TemporaryDirectory() as first, TemporaryDirectory() as second:
        runner = kind(shortened(inputs), Path(first), task)
        getattr(runner, task)()
        runner.inputs, runner.scratch = inputs, Path(second)
        answers.write(json.dumps(measure(getattr(runner, task))) + "\n")
    answers.close()


def shortened(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs cut to a few tokens and prompts."""
    texts = {name: inputs[name][:SHORT] for name in ("text", "clean", "corrupted")}
    return inputs | texts | {"prompts": [prompt[:SHORT] for prompt in inputs["prompts"][:2]]}


def measure(task: Any) -> dict[str, float]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed pages that are kept would hide what the task needs
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes the current size
    begin, cpu = time.perf_counter(), time.process_time()
    kept, number = task()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    peak = resident("VmHWM")
    del kept
    return {"seconds": seconds, "cpu_seconds": cpu, "megabytes": (peak - before) / 1e6, "number": number}


def resident(what: str) -> int:
    """Bytes of resident pages: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


if __name__ == "__main__":
    main(*sys.argv[1:])
