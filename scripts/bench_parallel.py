"""Compare decoding in one process and in several on the same cores.

    python scripts/bench_parallel.py [--ckpt_dir DIR] [--processes 2] [--gen_len 32] [--rounds 5]

Every round runs one process with all threads, then `processes` of them (torchrun, Gloo) that share the
threads. Without a checkpoint, random weights in the shape of Llama 3.2 1B are made in a temporary
folder: 2.5 GB. Communication is the time in collective calls on the first process, waiting included.
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
from typing import Annotated

import torch
import torch.distributed as dist

from llama_ref import Llama
from llama_ref.checkpoint.releases import find_release
from llama_ref.cli.parsing.flags import Flag
from llama_ref.cli.parsing.parser import command, run
from llama_ref.decoding.loop import steps
from llama_ref.decoding.row import Row
from llama_ref.errors import LlamaRefError

PROMPT = list(range(1000, 1016))
COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "send", "recv")


@command()
def main(
    ckpt_dir: Annotated[str | None, Flag("checkpoint", unset="random weights")] = None,
    *,
    processes: Annotated[int, Flag("number of processes to compare with one")] = 2,
    gen_len: Annotated[int, Flag("tokens to generate")] = 32,
    rounds: Annotated[int, Flag("number of measurements of each")] = 5,
    worker: Annotated[str | None, Flag("used by the script itself", metavar="FILE")] = None,
) -> None:
    """Compare the decoding speed of one process with that of several."""
    if worker:
        measure(ckpt_dir, gen_len, Path(worker))
        return
    with tempfile.TemporaryDirectory() as scratch:
        ckpt_dir = ckpt_dir or _random_1b(Path(scratch) / "Llama3.2-1B")
        jobs = {1: [], processes: []}
        for _ in range(rounds):
            for n, results in jobs.items():
                results.append(_job(n, ckpt_dir, gen_len, Path(scratch) / "figures.json"))
    for n, results in jobs.items():
        rates = [result["tokens_per_second"] for result in results]
        talk = statistics.median(result["communication"] for result in results)
        print(
            f"{n} process{'es' * (n > 1)}: {statistics.median(rates):.2f} tokens/s ({min(rates):.2f} to {max(rates):.2f}), "
            f"{talk * 1000:.1f} ms of {1000 / statistics.median(rates):.1f} ms per token in communication"
        )
    pairs = zip(jobs[processes], jobs[1], strict=True)
    ratios = [several["tokens_per_second"] / one["tokens_per_second"] for several, one in pairs]
    print(f"ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"torch {torch.__version__}, {_cores()} cores, {gen_len} tokens after {len(PROMPT)}, {rounds} rounds, bfloat16")


def _random_1b(path: Path) -> Path:
    from make_random_checkpoint import make_random_checkpoint

    print(f"making random weights in {path}", file=sys.stderr)
    return make_random_checkpoint(path, find_release("Llama3.2-1B").params, tied=True, tokenizer=_tokenizer())


def _tokenizer() -> Path:
    import llama_models  # Meta's package, which has the file (extra `dev`)

    return Path(llama_models.__file__).parent / "llama3" / "tokenizer.model"


def _job(n: int, ckpt_dir: str | Path, gen_len: int, figures: Path) -> dict[str, float]:
    words = [__file__, "--ckpt_dir", str(ckpt_dir), "--gen_len", str(gen_len), "--worker", str(figures)]
    starter = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)] if n > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, _cores() // n))}
    done = subprocess.run([sys.executable, *starter, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise LlamaRefError(f"the job of {n} failed:\n{done.stderr}")
    return json.loads(figures.read_text())


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def measure(ckpt_dir: str, gen_len: int, figures: Path) -> None:
    """Run one process of a job; the first writes the figures to a file."""
    llama = Llama.build(ckpt_dir, device="cpu", dtype="bfloat16", verify="never")
    spent = _watch_collectives()
    decoding = steps(llama.model, [Row(PROMPT, gen_len + 2)], lambda logits: logits.argmax(-1), stop_tokens=())
    next(decoding)  # the prompt
    next(decoding)  # warm-up
    spent.clear()
    start = time.perf_counter()
    for _ in decoding:
        pass
    seconds = time.perf_counter() - start
    if llama.job.share.rank == 0:
        figures.write_text(json.dumps({"tokens_per_second": gen_len / seconds, "communication": sum(spent) / gen_len}))


def _watch_collectives() -> list[float]:
    """A list to which every later collective call appends its seconds."""
    spent: list[float] = []

    def timed(call: Callable) -> Callable:
        def wrapper(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - start)

        return wrapper

    for name in COLLECTIVES:
        setattr(dist, name, timed(getattr(dist, name)))
    return spent


if __name__ == "__main__":
    sys.exit(run(main))
