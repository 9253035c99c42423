"""`pytest -m cuda` finds its tests on a machine with a GPU, PyTorch and few other packages."""

import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY

TESTS = REPOSITORY / "tests"


def collected(*options: str) -> subprocess.CompletedProcess[str]:
    """pytest's list of tests with the packages of bare_machine.py hidden."""
    own = {
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS, REPOSITORY))),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
    }
    plugins = ["-p", "bare_machine", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *plugins, "-o", "addopts=", "-q", "--collect-only", *options]
    return subprocess.run(command, cwd=REPOSITORY, env=os.environ | own, capture_output=True, text=True, check=False)


def marked_tests() -> set[str]:
    """Names such as "test_model.py::test_x" of the tests whose source has the mark, by function or by file."""
    found = set()
    for path in TESTS.rglob("test_*.py"):
        text = path.read_text()
        whole_file = re.search(r"^pytestmark = (\[\s*)?pytest\.mark\.cuda\b", text, re.MULTILINE)
        pattern = r"^def (test_\w+)" if whole_file else r"^@pytest\.mark\.cuda\n(?:[@ ].*\n|\).*\n|\].*\n)*def (test_\w+)"
        found |= {f"{path.relative_to(REPOSITORY)}::{name}" for name in re.findall(pattern, text, re.MULTILINE)}
    return found


def test_all_cuda_tests_are_found_without_the_other_packages():
    done = collected("-m", "cuda")
    assert done.returncode == 0, done.stdout + done.stderr
    names = {line.partition("[")[0] for line in done.stdout.splitlines() if line.startswith("tests/")}
    assert names == marked_tests()
    assert any(name.startswith("tests/test_on_cuda.py") for name in names)


def test_a_package_that_is_missing_is_an_error_in_every_other_run():
    path = Path("tests") / "test_args.py"
    done = collected(str(path))
    assert done.returncode == 2
    assert "No module named 'hypothesis'" in done.stdout
