"""scripts/environment.sh: which .venv it makes, and which it leaves alone."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY

PYTHON = f"""#!/bin/sh
case "$*" in "-m venv"*) echo "making: $*"; exit 3;; esac
exec {sys.executable} "$@"
"""  # an interpreter that is interrupted as it makes an environment


@pytest.fixture
def clone(tmp_path) -> Path:
    for name in ("setup.cfg", "pyproject.toml", "scripts/constraints.txt", "scripts/environment.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def make(clone: Path) -> subprocess.CompletedProcess[str]:
    script = "set -euo pipefail; source scripts/environment.sh; environment demo"
    settings = {"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHON": str(clone / "python")}
    return subprocess.run(["bash", "-c", script], cwd=clone, env=settings, capture_output=True, text=True, check=False)


def test_an_environment_of_somebody_else_is_left_alone(clone):
    (clone / ".venv").mkdir()
    (clone / ".venv" / "mine").write_text("years of work")
    done = make(clone)
    assert done.returncode == 2 and f"{clone}/.venv exists, but no script of this repository made it" in done.stderr
    assert [path.name for path in (clone / ".venv").iterdir()] == ["mine"]


def test_an_interrupted_one_is_made_again_from_scratch(clone):
    assert make(clone).returncode == 3  # interrupted
    (clone / ".venv" / "half").touch()
    done = make(clone)
    assert done.returncode == 3 and "making: -m venv" in done.stdout
    assert [path.name for path in (clone / ".venv").iterdir()] == [".unfinished"]


def test_one_of_another_python_is_made_again(clone):
    (clone / ".venv").mkdir()
    (clone / ".venv" / ".made").write_text("another clone, Python 3.8\n")
    (clone / ".venv" / "old").touch()
    assert make(clone).returncode == 3
    assert [path.name for path in (clone / ".venv").iterdir()] == [".unfinished"]
