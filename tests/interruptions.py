"""Ctrl-C at any step of a program: programs that tests run in another process, and what they share."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

TESTS = Path(__file__).parent


def interrupt(work: Callable[[], object], step: int) -> bool:
    """Run a function, and press Ctrl-C before its opcode number `step`; return whether it was interrupted."""
    steps = 0

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        frame.f_trace_opcodes = True
        steps += event == "opcode"  # an exception at another event would end a generator without its `finally`
        if event == "opcode" and steps == step:
            signal.raise_signal(signal.SIGINT)
        return count

    sys.settrace(count)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def assert_prints_no_step(python: Path, program: str) -> None:
    """Run a program that prints the list of steps after which something was wrong."""
    done = subprocess.run(
        [python, "-c", program],
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr[-1000:]
