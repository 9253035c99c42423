"""The Triton kernels' arithmetic in Triton's interpreter, which needs a separate process."""

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest
import torch

from conftest import REPOSITORY


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run here")
def test_the_kernels_compute_what_the_model_does(warm):
    path = Path(__file__).with_name("interpreted_kernels.py")
    command = [warm / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
