"""Decode tokens per second of one sequence, ours beside transformers', alternating in one run.

    python scripts/bench_decode.py [--ckpt_dir checkpoints/SmolLM2-135M-Instruct] [--gen_len 32] [--rounds 7]

Both hold the same weights in bfloat16 on the CPU and decode greedily from the same prompt with their own KV caches. Prints the
medians, and the median of the rounds' ratios: on a busy machine only that means something.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llama_ref import Llama
from llama_ref.command_line import command, run
from llama_ref.loop import Row, steps

PROMPT = "The capital of France is"


@command()
def main(ckpt_dir: str = "checkpoints/SmolLM2-135M-Instruct", *, gen_len: int = 32, rounds: int = 7) -> None:
    """Compare with transformers, which must be installed (extra `dev`)."""
    llama = Llama.build(ckpt_dir, device="cpu", dtype="bfloat16")
    prompt = llama.encode(PROMPT)
    rates = {"llama_ref": _ours(llama, prompt, gen_len), "transformers": _theirs(llama, prompt, gen_len)}
    measured: dict[str, list[float]] = {name: [] for name in rates}
    for _ in range(rounds):
        for name, rate in rates.items():
            measured[name].append(rate())
    for name, values in measured.items():
        print(f"{name:<14}{statistics.median(values):8.2f} tokens/s   ({min(values):.2f} to {max(values):.2f})")
    ratios = [ours / theirs for ours, theirs in zip(measured["llama_ref"], measured["transformers"], strict=True)]
    print(f"{'ratio':<14}{statistics.median(ratios):8.2f}")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {gen_len} tokens after {len(prompt)}, {rounds} rounds"
    )


def _ours(llama: Llama, prompt: list[int], gen_len: int) -> Callable[[], float]:
    def rate() -> float:
        making = steps(llama.model, [Row(prompt, gen_len + 1)], lambda logits: logits.argmax(-1), stop_tokens=())
        next(making)  # the prompt
        begun = time.perf_counter()
        for _ in making:
            pass
        return gen_len / (time.perf_counter() - begun)

    return rate


def _theirs(llama: Llama, prompt: list[int], gen_len: int) -> Callable[[], float]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # where the same weights are put under their names
    from parity.oracles import hugging_faces_model

    model = hugging_faces_model(llama.model)

    @torch.inference_mode()
    def rate() -> float:
        out = model(torch.tensor([prompt]), use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        begun = time.perf_counter()
        for _ in range(gen_len):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return gen_len / (time.perf_counter() - begun)

    return rate


if __name__ == "__main__":
    sys.exit(run(main))
