"""A contestant's process: loads a model, measures on request and sleeps between requests.

    python -m llama_ref.bench.worker CONTESTANT

Each line of JSON on standard input is a request, answered by a line of JSON on standard output. The
first request is "load", with the settings.
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
from llama_ref.machine import thread_limit

PROBE = "bandwidth"
CONTESTANTS = {  # name: (module of llama_ref.bench.peers, class)
    OURS: ("ours", "Ours"),
    "transformers": ("transformers", "Transformers"),
    "llama.cpp": ("llama_cpp", "LlamaCpp"),
    "meta": ("meta", "Meta"),
    PROBE: ("bandwidth", "Bandwidth"),
}
LONGEST_ERROR = 300  # characters
QUIET_SECONDS, QUIET_CHECKS = 0.05, 40


class Server:
    """Serves requests for a contestant; each method is a request."""

    def __init__(self, name: str):
        self.name = name

    def load(self, settings: dict[str, Any], scratch: str) -> dict[str, Any]:
        import torch

        self.settings = Settings.from_json(settings)
        self.device = torch.device(self.settings.device)
        torch.set_num_threads(self.settings.threads)
        module, kind = CONTESTANTS[self.name]
        self.contestant = getattr(importlib.import_module(f"llama_ref.bench.peers.{module}"), kind)(
            self.settings, Path(scratch)
        )
        return {key: getattr(self.contestant, key, None) for key in ("precision", "weight_bytes", "kv_bytes")}

    def read(self) -> dict[str, Any]:
        return {"bytes_per_second": self.contestant.bytes_per_second()}

    def generate(self, prompts: list[list[int]], gen_len: int) -> dict[str, Any]:
        measured = self._measure(self.contestant.steps(prompts, gen_len))
        return measured | {"matmul_seconds": self.contestant.matmul_seconds(len(prompts), len(prompts[0]))}

    def generate_after(self, context: int, gen_len: int) -> dict[str, Any]:
        return self._measure(self.contestant.steps_after(context, gen_len)) | {"matmul_seconds": None}

    def _measure(self, steps: Iterator[list[int]]) -> dict[str, Any]:
        from llama_ref.bench.machine import forget_peak, peak_bytes

        forget_peak(self.device)
        start = time.perf_counter()
        tokens = [next(steps)[0]]
        first = time.perf_counter()
        tokens += [step[0] for step in steps]
        end = time.perf_counter()
        return {
            "first_seconds": first - start,
            "decode_seconds": end - first,
            "peak_bytes": peak_bytes(self.device),
            "tokens": tokens,
        }


def main() -> None:
    """Answer requests on standard input until it is closed or the parent process has ended."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to stderr
    server = Server(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        answer = _answer(server, request.pop("do"), request)
        _wait_for_own_threads()
        try:
            _write(answers, answer)
        except BrokenPipeError:
            return  # the parent process has ended


def _answer(server: Server, request: str, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return getattr(server, request)(**arguments)
    except Exception as error:
        return {"error": _one_line(error), "is_misuse": isinstance(error, RequestError)}


def _one_line(error: Exception) -> str:
    if thread_limit.caused(error):
        return thread_limit.MESSAGE
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no reason given"
    return text[:LONGEST_ERROR] if isinstance(error, LlamaRefError) else f"{type(error).__name__}: {text}"[:LONGEST_ERROR]


def _wait_for_own_threads() -> None:
    """Wait until this process is idle: spinning threads would slow the next contestant."""
    for _ in range(QUIET_CHECKS):
        before = time.process_time()
        time.sleep(QUIET_SECONDS)
        if time.process_time() - before < QUIET_SECONDS / 10:
            return


def _write(stream: TextIO, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
