"""Start a contestant's process (worker.py) and send it requests."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_ref
from llama_ref.errors import LlamaRefError, RequestError
from llama_ref.formatting import printable

LONGEST_ERROR = 300  # characters
SESSION, TIMES = 3, slice(11, 15)  # fields of /proc/PID/stat after the name


class Failed(LlamaRefError):
    """A request to a contestant failed, or its process has ended."""


class Process:
    """A contestant's process in its own session: only the parent gets Ctrl-C, and kills it."""

    def __init__(self, name: str, threads: int, scratch: Path):
        self.name = name
        self.log = scratch / f"{name}.log"
        packages = [str(Path(llama_ref.__file__).parents[1]), os.environ.get("PYTHONPATH")]
        settings = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, packages))}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llama_ref.bench.worker", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | settings,
                start_new_session=True,
                text=True,
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests, self.answers = self.process.stdin, self.process.stdout
        self._used: float | None = None  # CPU seconds, once the process has ended

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and return the answer.

        Raises RequestError for misuse, Failed for other errors.
        """
        try:
            self.requests.write(json.dumps({"do": request, **arguments}) + "\n")
            self.requests.flush()
            line = self.answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Failed(f"its process ended {self._how_it_ended()}")
        answer = json.loads(line)
        if "error" in answer:
            raise (RequestError if answer["is_misuse"] else Failed)(answer["error"])
        return answer

    def end(self) -> None:
        """Kill the process and all its children."""
        self._used = self.cpu_seconds()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.answers.close()
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()

    def cpu_seconds(self) -> float:
        """CPU seconds of this process and its children; 0 if unknown."""
        return session_seconds(self.process.pid) if self._used is None else self._used

    def _how_it_ended(self) -> str:
        code = self.process.wait()
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with {code}"
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{how}: {printable(lines[-1][:LONGEST_ERROR])}" if lines else how


def session_seconds(session: int) -> float:
    """CPU seconds of all processes in a session, including ended children. Linux only."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[SESSION]) == session:
            ticks += sum(map(int, fields[TIMES]))
    return ticks / os.sysconf("SC_CLK_TCK")
