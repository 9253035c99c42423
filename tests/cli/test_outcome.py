"""Logging, exit codes and error messages of a command line."""

import logging
import subprocess
import sys

import pytest

from llama_ref.cli.parsing.flags import command
from llama_ref.cli.parsing.parser import run
from llama_ref.errors import CheckpointError, RequestError

logger = logging.getLogger("llama_ref.study.trace")


@command()
def talk() -> None:
    """Log at three levels."""
    logger.debug("a detail")
    logger.info("3 of 5 layers")
    logger.warning("%s is slow", "this")
    print("result")


def test_what_the_package_logs_is_shown_as_plain_lines(capsys):
    for _ in range(2):  # a second run adds no second handler
        assert run(talk, []) == 0
        assert capsys.readouterr() == ("result\n", "3 of 5 layers\nthis is slow\n")


def test_a_library_user_sees_warnings_only():
    script = (
        "import logging, llama_ref.cli.parsing.parser; logger = logging.getLogger('llama_ref.study');"
        "logger.info('progress'); logger.warning('problem')"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "problem\n")


def test_a_level_that_the_caller_chose_is_kept(capsys):
    own = logging.getLogger("llama_ref")
    own.setLevel(logging.ERROR)
    try:
        assert run(talk, []) == 0
        assert own.level == logging.ERROR
    finally:
        own.setLevel(logging.NOTSET)
    assert capsys.readouterr() == ("result\n", "")


def test_only_the_first_process_shows_them(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # restored afterwards
    assert run(talk, []) == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (RequestError("no"), 2, "llama-ref: no\n"),
        (CheckpointError("bad\nfile \x1b[31m"), 1, "llama-ref: bad\nfile \\x1b[31m\n"),
        (OSError(28, "No space left on device"), 1, "llama-ref: cannot write the output: No space"),
        (KeyboardInterrupt(), 130, "\n"),
    ],
)
def test_an_error_is_a_line_and_an_exit_code(error, code, shown, capsys):
    @command()
    def fail() -> None:
        """Fail."""
        raise error

    assert run(fail, []) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(shown)


def test_a_bug_leaves_its_traceback():
    @command()
    def fail() -> None:
        """Fail."""
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        run(fail, [])
