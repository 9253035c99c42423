"""Jobs of several processes, as torchrun starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

WORKER = Path(__file__).with_name("parallel_worker.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def torchrun(
    n_processes: int, *words: str | Path, warm: Path | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a script with arguments in several processes on this machine.

    `options` are subprocess.run's. `warm`: the fixture, if the processes may be forked from a warm
    Python.
    """
    command = [*([warm / "torchrun"] if warm else TORCHRUN), "--standalone", "--nproc_per_node", str(n_processes), *words]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 240} | options
    return subprocess.run(command, text=True, env=ENVIRONMENT, check=False, **options)


def run_worker(warm: Path, place: Path, n_processes: int, task: dict[str, Any]) -> dict:
    """The results that the first process of parallel_worker.py wrote."""
    (place / "task.json").write_text(json.dumps(task))
    done = torchrun(n_processes, WORKER, place / "task.json", place / "out.pt", warm=warm)
    assert done.returncode == 0, done.stderr
    return torch.load(place / "out.pt")
