"""CPU cores; separate from device.py so that checking files does not wait for torch's import."""

import os


def cpu_count() -> int:
    """The number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
