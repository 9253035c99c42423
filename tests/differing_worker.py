"""A job whose processes differ in one option after another and record the error of each.

torchrun --nproc_per_node 2 differing_worker.py TASK.json OUT_FOLDER

The last difference ends the job, as it would a command.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llama_ref.cli.parsing.parser import command, run
from llama_ref.errors import JobError
from llama_ref.generation import Llama

MEASURED = 50  # comparisons


@command()
def main(task_file: str, out: str) -> None:
    """Build and generate with the task's options for this rank."""
    task = json.loads(Path(task_file).read_text())
    rank = int(os.environ["RANK"])
    said: dict[str, Any] = {name: error_of(build, each[rank]) for name, each in task["builds"].items()}
    llama = build(task["base"])
    said |= {name: error_of(generate, llama, each[rank]) for name, each in task["calls"].items()}
    said["other seeds"] = error_of(generate, llama, {"temperature": 1, "seed": rank})
    if rank == 0:
        said["another step"] = error_of(generate, llama, {})
    else:
        said["another step"] = error_of(build, task["base"])
    said["shortest"] = shortest_check(llama)
    Path(out, f"{rank}.json").write_text(json.dumps(said))
    generate(llama, {"max_gen_len": 2 + rank})


def build(options: dict) -> Llama:
    return Llama.build(**{"device": "cpu", "dtype": "float32", "max_seq_len": 64, "verify": "never"} | options)


def generate(llama: Llama, options: dict) -> None:
    llama.generate(**{"prompt_tokens": [[1, 2, 3]], "max_gen_len": 2, "temperature": 0} | options)


def error_of(call: Any, *arguments: Any) -> str:
    """The message of the JobError that the call raises; empty if there is none."""
    try:
        call(*arguments)
    except JobError as error:
        return str(error)
    return ""


def shortest_check(llama: Llama) -> float:
    """Seconds of one comparison, the shortest of many, so that other load does not matter."""
    dist.barrier()
    times = [time.perf_counter()]
    for n in range(MEASURED):
        llama.job.check_same("measuring", {"n": n})
        times.append(time.perf_counter())
    return min(after - before for before, after in itertools.pairwise(times))


if __name__ == "__main__":
    sys.exit(run(main))
