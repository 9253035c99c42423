"""A quantized release takes memory for its own bytes, never for a whole matrix in another dtype."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_ref.checkpoint.meta_quantized.kinds import Kind
from make_random_checkpoint import make_random_checkpoint
from quantized_folders import SCHEME

WIDE = {
    "dim": 2048,
    "n_layers": 2,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 4096,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
WIDE |= {"multiple_of": 256, "ffn_dim_multiplier": 1.5}  # the layers of a 1B
LAYER = 2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 8192 * 2048  # weights
MB = 1e6

CHILD = """
import re, sys, torch
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.quantization.apply import use_fast_kernels

def private():  # bytes that are not a file's pages
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

with torch.inference_mode():
    torch.nn.functional.linear(torch.ones(4, 64), torch.ones(64, 64))
    before, folder = private(), open_folder(sys.argv[1])
    model = load_model(folder, folder.read_args(), dtype=torch.bfloat16)
    use_fast_kernels(model)
    for _ in range(3):
        assert model(torch.tensor([[1, 2, 3]])).isfinite().all()
    print(private() - before)
"""


def private_bytes(warm: Path, folder: Path) -> int:
    done = subprocess.run([warm / "python", "-c", CHILD, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", [Kind.INT4, Kind.FP8])
def test_a_models_memory(warm, tmp_path, kind):
    sections: dict[str, Any] = {"quantization_args": SCHEME | {"spinquant": True}} if kind is Kind.INT4 else {}
    folder = make_random_checkpoint(tmp_path / "folder", WIDE | sections, kind=kind)
    found = private_bytes(warm, folder)
    if kind is Kind.INT4:
        assert found < WIDE["n_layers"] * LAYER * (4 + 1) / 8 + 50 * MB, "four bits, and a scale of 32 for 32 of them"
    else:
        assert found < 50 * MB, "less than a matrix in float32 (67 MB): weights stay in the file"
