"""Freed memory that the C library keeps, as scratch space that is needed again at once."""

import platform
import subprocess

import pytest

from folders import tiny_folder

# After this, no new pages may be requested from the system; before it, chance decides what is at
# the top of the heap.
SCRATCH = """
import resource, sys, torch
from llama_ref import Llama

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        [torch.ones(1 << 20) for _ in range(3)]  # 4 MB each, held at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

Llama.build(sys.argv[1], device="cpu")
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have rules of their own")
def test_a_loaded_models_scratch_memory_is_kept_for_the_next_layer(warm, tmp_path):
    command = [warm / "python", "-c", SCRATCH, tiny_folder(tmp_path / "tiny")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20
