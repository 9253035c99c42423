"""Compare the speed of `study.collect` with plain prefill of the same prompts, in one run.

    python scripts/bench_collect.py [--folder checkpoints/SmolLM2-135M-Instruct] [--prompts 10000]

Prompts are 4 to 19 words of scripts/quality_texts/english.txt. Both methods run one part of the
prompts after another in turn, so that a busy machine slows both down. Plain prefill runs the same
passes as `collect` (right-padded, of at most 1,024 tokens) and keeps nothing.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import fire
import torch

from llama_ref import study
from llama_ref.errors import LlamaRefError
from llama_ref.generation import Llama
from llama_ref.study.passes.pass_size import split_passes
from llama_ref.study.texts import Batch

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = REPOSITORY / "scripts" / "quality_texts" / "english.txt"
DEMO = REPOSITORY / "checkpoints" / "SmolLM2-135M-Instruct"
PART = 200  # prompts


def main(
    folder: str | Path = DEMO,
    prompts: int = 10000,
    names: str = "layers.*.residual_post",
    positions: str = "last",
    dtype: str = "float32",
    device: str = "cpu",
) -> None:
    """Print the seconds of both, and the speed of `collect` relative to plain prefill."""
    llama = Llama.build(folder, device=device, dtype=dtype)
    texts = [llama.encode(text) for text in some_prompts(prompts)]
    plain(llama, texts[:50])
    ours = theirs = (0.0, 0.0)
    for begin in range(0, len(texts), PART):
        part = texts[begin : begin + PART]
        theirs = add(theirs, seconds(partial(plain, llama, part)))
        ours = add(ours, seconds(partial(collected, llama, part, names, positions)))
    tokens = sum(map(len, texts))
    print(f"{len(texts):,} prompts, {tokens:,} tokens, {dtype}, {torch.get_num_threads()} threads; {names}, {positions}")
    for what, mine, other in zip(("elapsed", "CPU time"), ours, theirs, strict=True):
        print(f"{what}: collect {mine:.1f} s, plain prefill {other:.1f} s: {other / mine:.3f} of its speed")


def some_prompts(n: int) -> list[str]:
    """`n` prompts that are all different."""
    words = TEXT.read_text(encoding="utf-8").split()
    starts = [(7 * i) % (len(words) - 20) for i in range(n)]
    return [f"{i} " + " ".join(words[start : start + 4 + i % 16]) for i, start in enumerate(starts)]


def plain(llama: Llama, texts: list[list[int]]) -> None:
    in_order = sorted((torch.tensor(text) for text in texts), key=len, reverse=True)
    with torch.no_grad():
        for some in split_passes([len(text) for text in in_order]):
            llama.model.hidden(Batch.from_texts(llama.model, in_order[some.start : some.stop]).ids)
    if llama.device.type == "cuda":
        torch.cuda.synchronize()


def collected(llama: Llama, texts: list[list[int]], names: str, positions: str) -> None:
    with TemporaryDirectory() as folder:
        study.collect(llama, texts, names.split(","), to=folder, positions=positions)


def seconds(run: Callable[[], None]) -> tuple[float, float]:
    """Elapsed seconds, and CPU seconds of all cores, which say more on a busy machine."""
    begin, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - begin, time.process_time() - cpu


def add(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return a[0] + b[0], a[1] + b[1]


if __name__ == "__main__":
    try:
        fire.Fire(main)
    except LlamaRefError as error:
        raise SystemExit(f"bench_collect: {error}") from None
