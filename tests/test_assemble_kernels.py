"""scripts/assemble_kernels.py compiles kernels for a card that the machine does not have."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from conftest import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "assemble_kernels.py"
with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")


def assembled(warm: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run in a separate process: in this one, Triton may have been imported for its interpreter."""
    return subprocess.run([warm / "python", SCRIPT, *words], capture_output=True, text=True, check=False)


@with_triton
def test_a_t4_holds_the_attention_kernel_without_spilling_and_an_h100_loads_16_bytes_at_a_time(warm):
    done = assembled(warm, "--cards", "75,90", "--release", "Llama3.2-1B", "--only", "attention")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^ +attention, (\w+) +(\d+) +(\d+) +([\d.]+) +(\d+) +(\d+)", done.stdout, re.MULTILINE)
    assert [row[0] for row in found] == ["look", "put_together"] * 2
    assert all(int(spilled) == 0 and float(shared) <= 64 for _, _, spilled, shared, *_ in found[:2])
    assert int(found[2][-1]) > 0


@pytest.mark.parametrize(
    ("words", "message"), [(("--cards", "70"), "expected some of 75, 80"), (("--release", "Llama9"), "unknown Llama 3 release")]
)
def test_a_card_or_release_that_is_not_known_is_misuse(warm, words, message):
    done = assembled(warm, *words)
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="Triton is installed")
def test_without_triton_it_says_so(warm):
    done = assembled(warm)
    assert done.returncode == 1 and "Triton is not installed" in done.stderr and done.stdout == ""
