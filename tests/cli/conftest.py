"""Fixtures that run a command line in this process."""

from collections.abc import Callable

import pytest

from conftest import exit_code


@pytest.fixture
def run(capsys) -> Callable[..., tuple[int, str, str]]:
    """Run a command line; return (exit code, stdout, stderr)."""

    def run(*words: str) -> tuple[int, str, str]:
        return exit_code(words), *capsys.readouterr()

    return run
