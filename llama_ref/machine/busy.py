"""Detect that other programs keep the processor busy, which slows many threads more than one."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from llama_ref.machine.cores import cpu_count

STAT = Path("/proc/stat")
NICE, IDLE, IOWAIT, STEAL = 1, 3, 4, 7  # columns of its cpuN lines
SHORTEST = 0.5  # seconds: the kernel counts hundredths
NOTICEABLE = 0.4  # cores


class OtherPrograms:
    """Measures, from its creation on, how many of this process's cores other programs use.

    Linux only. `own` returns the CPU seconds that do not count as other programs: by default
    this process's.
    """

    def __init__(self, own: Callable[[], float] = time.process_time) -> None:
        self._own = own
        self._began = self._now()

    def _now(self) -> tuple[float, float, float]:
        """Wall-clock seconds, own CPU seconds, all programs' CPU seconds on these cores."""
        return time.perf_counter(), self._own(), busy_seconds()

    def cores(self) -> float:
        """Cores that other programs used on average; 0 if unknown or measured too briefly."""
        passed, own, all_programs = (now - began for now, began in zip(self._now(), self._began, strict=True))
        return max(0.0, all_programs - own) / passed if passed >= SHORTEST else 0.0

    def hint(self, threads: int) -> str | None:
        """Advice if other programs slow this many threads down, else None."""
        return hint(self.cores(), cpu_count(), threads)


def hint(others: float, n_cores: int, threads: int) -> str | None:
    """Advice if other programs use `others` of `n_cores`; None if `threads` still have room."""
    fitting = max(1, int(n_cores - others + 0.5))
    if others < NOTICEABLE or threads <= n_cores - others or threads == 1:
        return None
    better = min(fitting, threads - 1)
    return f"other programs used {others:.1f} of {n_cores} cores during this run: try --threads {better}"


def busy_seconds() -> float:
    """Seconds that this process's cores have been busy since the machine started; 0 if unknown.

    Work at low priority (nice) counts only if this process has a low priority too.
    """
    own = {f"cpu{core}" for core in os.sched_getaffinity(0)} if hasattr(os, "sched_getaffinity") else set()
    try:
        lines = [line.split() for line in STAT.read_text().splitlines()]
        counts = [list(map(int, fields)) for name, *fields in lines if name in own]
    except (OSError, ValueError):
        return 0.0
    unseen = {IDLE, IOWAIT} | ({NICE} if os.nice(0) <= 0 else set())
    ticks = sum(n for fields in counts for column, n in enumerate(fields[: STEAL + 1]) if column not in unseen)
    return ticks / os.sysconf("SC_CLK_TCK")
