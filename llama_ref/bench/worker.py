"""One contestant's process: it loads, then measures whenever it is asked to, and sleeps meanwhile.

    python -m llama_ref.bench.worker CONTESTANT

A line of JSON on standard input is a request, one on standard output its answer; the first request has the settings.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from llama_ref.bench.settings import OURS, Settings
from llama_ref.errors import LlamaRefError, RequestError

PROBE = "bandwidth"
PLACES = {
    OURS: ("ours", "Ours"),
    "transformers": ("transformers", "Transformers"),
    "llama.cpp": ("llama_cpp", "LlamaCpp"),
    "meta": ("meta", "Meta"),
    PROBE: ("bandwidth", "Bandwidth"),
}
LONGEST_ERROR = 300  # characters
QUIET, QUIET_CHECKS = 0.05, 40  # seconds


class Served:
    """A contestant by its name, and what can be asked of it."""

    def __init__(self, name: str):
        self.name = name

    def load(self, settings: dict[str, Any], scratch: str) -> dict[str, Any]:
        import torch

        self.settings = Settings.from_json(settings)
        self.device = torch.device(self.settings.device)
        torch.set_num_threads(self.settings.threads)
        module, kind = PLACES[self.name]
        self.contestant = getattr(importlib.import_module(f"llama_ref.bench.peers.{module}"), kind)(
            self.settings, Path(scratch)
        )
        return {key: getattr(self.contestant, key, None) for key in ("precision", "weight_bytes", "kv_bytes")}

    def read(self) -> dict[str, Any]:
        return {"bytes_per_second": self.contestant.bytes_per_second()}

    def generate(self, prompts: list[list[int]], gen_len: int) -> dict[str, Any]:
        measured = self._measured(self.contestant.steps(prompts, gen_len))
        return measured | {"matmul_seconds": self.contestant.matmul_seconds(len(prompts), len(prompts[0]))}

    def generate_after(self, context: int, gen_len: int) -> dict[str, Any]:
        return self._measured(self.contestant.steps_after(context, gen_len)) | {"matmul_seconds": None}

    def _measured(self, making: Iterator[list[int]]) -> dict[str, Any]:
        from llama_ref.bench.machine import forget_peak, peak_bytes

        forget_peak(self.device)
        begun = time.perf_counter()
        tokens = [next(making)[0]]
        first = time.perf_counter()
        tokens += [step[0] for step in making]
        ended = time.perf_counter()
        return {
            "first_seconds": first - begun,
            "decode_seconds": ended - first,
            "peak_bytes": peak_bytes(self.device),
            "tokens": tokens,
        }


def main() -> None:
    """Answer the requests on standard input until there are no more, or nobody reads the answers."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    served = Served(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        answer = _answer(served, request.pop("do"), request)
        _wait_for_own_threads()
        try:
            _write(answers, answer)
        except BrokenPipeError:
            return  # nobody waits for it any more


def _answer(served: Served, wish: str, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return getattr(served, wish)(**arguments)
    except Exception as error:
        return {"error": _one_line(error), "is_misuse": isinstance(error, RequestError)}


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no reason given"
    return text[:LONGEST_ERROR] if isinstance(error, LlamaRefError) else f"{type(error).__name__}: {text}"[:LONGEST_ERROR]


def _wait_for_own_threads() -> None:
    """Until they sleep: many spin a while for more work, and would take it out of the next contestant's time."""
    for _ in range(QUIET_CHECKS):
        before = time.process_time()
        time.sleep(QUIET)
        if time.process_time() - before < QUIET / 10:
            return


def _write(stream: TextIO, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
