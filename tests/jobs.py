"""Jobs of several processes, as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def torchrun(n_processes: int, *words: str | Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """A script with its words in so many processes on this machine, to its end."""
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", str(n_processes), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT, check=False)
