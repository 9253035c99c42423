"""What the C library keeps of freed memory: nothing where it shall be given back, scratch space where it is needed again."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have rules of their own")

SCRATCH = """
import resource, torch
from llama_ref.heap import keep_scratch_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(1 << 21)  # 8 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
faults()
before = faults()
keep_scratch_memory()
faults()
print(before, faults())
"""


def test_scratch_memory_is_kept_for_the_next_layer():
    eager = {"MALLOC_TRIM_THRESHOLD_": str(128 << 10), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}  # to give all back at once
    done = subprocess.run([sys.executable, "-c", SCRATCH], capture_output=True, text=True, check=True, env=os.environ | eager)
    before, after = map(int, done.stdout.split())
    assert before >= 40 and after < before / 10, (before, after)  # pages, huge ones perhaps
