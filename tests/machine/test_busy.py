"""Processor use of other programs, and the hint about threads."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_ref.machine.busy import OtherPrograms, hint


@pytest.mark.parametrize(
    ("others", "n_cores", "threads", "better"),
    [
        (0.0, 2, 2, None),
        (0.3, 2, 2, None),
        (0.7, 2, 2, 1),
        (1.0, 2, 2, 1),
        (2.0, 2, 2, 1),
        (1.0, 2, 1, None),
        (1.0, 8, 8, 7),
        (3.2, 8, 8, 5),
        (3.2, 8, 4, None),
        (1.0, 1, 1, None),
        (9.0, 8, 8, 1),
    ],
)
def test_fewer_threads_are_advised_where_others_take_their_cores(others, n_cores, threads, better):
    found = hint(others, n_cores, threads)
    assert (found is None) if better is None else (found is not None and found.endswith(f"try --threads {better}"))


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="Linux counts them")
def test_another_program_is_seen_and_this_one_is_not_counted():
    spinning = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        spinning.stdout.readline()
        others = OtherPrograms()
        assert others.cores() == 0  # measured too briefly
        time.sleep(0.8)
        assert others.cores() > 0.1
    finally:
        spinning.kill()
        spinning.wait()
