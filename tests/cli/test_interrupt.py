"""Ctrl-C while a command starts or ends, and a limit on threads: one line, no traceback.

Signals are sent when a module is imported, so that they come at the same moment on every machine.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import REPOSITORY
from folders import tiny_folder
from llama_ref.machine import thread_limit

AT_IMPORT = """
import os, signal, sys

class Interrupt:
    @staticmethod
    def find_spec(name, path, target=None):
        if name == {moment!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt)
"""
# Python 3.10 handles signals only between two bytecode instructions.
AT_EXIT = "import atexit, os, signal, sys; atexit.register(lambda: [os.kill(os.getpid(), signal.SIGINT), len('more')])\n"
CONSOLE_SCRIPT = "from llama_ref.cli import main; sys.exit(main())"
MODULE = "import runpy; runpy.run_module('llama_ref', run_name='__main__')"
SCRIPT = f"import runpy; runpy.run_path({str(REPOSITORY / 'scripts' / 'text_completion.py')!r}, run_name='__main__')"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("interrupt") / "Tiny")


def call(code: str, *words: str | Path, prepare: Callable[[], object] | None = None) -> tuple[int, str, str]:
    """Run a Python program with these arguments; return its exit code, stdout and stderr."""
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, preexec_fn=prepare)
    return done.returncode, done.stdout, done.stderr


def take_interrupts() -> None:
    """Make Ctrl-C work again: a shell's background jobs and their children ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


MOMENTS = [
    (CONSOLE_SCRIPT, "llama_ref.cli.parsing.parser", ("--help",)),
    (MODULE, "llama_ref.cli.outcome", ("--help",)),
    (MODULE, "llama_ref.cli.parsing.help", ("--help",)),
    (CONSOLE_SCRIPT, "fire", ("verify", "TINY")),
    (MODULE, "rich.progress", ("verify", "TINY")),
    (CONSOLE_SCRIPT, "torch", ("complete", "TINY", "x")),
    (MODULE, "numpy", ("complete", "TINY", "x")),  # imported by PyTorch, which ignores errors there
    (SCRIPT, "torch.types", ("--ckpt_dir", "TINY")),
]


@pytest.mark.parametrize(("start", "moment", "words"), MOMENTS, ids=[moment for _, moment, _ in MOMENTS])
def test_ctrl_c_during_an_import_ends_it(start, moment, words, tiny):
    given = [tiny if word == "TINY" else word for word in words]
    assert call(AT_IMPORT.format(moment=moment) + start, *given, prepare=take_interrupts) == (130, "", "\n")


def test_ctrl_c_while_python_ends_is_no_traceback():
    code, out, err = call(AT_EXIT + CONSOLE_SCRIPT, "--version", prepare=take_interrupts)
    assert (code, err) == (130, "\n") and out.startswith("llama-ref ")


@pytest.mark.parametrize(
    ("said", "is_reached"), [("can't start new thread", True), ("can't create new thread at interpreter shutdown", False)]
)
def test_an_interpreter_that_shuts_down_is_no_limit(said, is_reached, monkeypatch):
    """At exit, Python 3.12 cannot start threads, whatever the limit."""

    def refuse(*_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr("_thread.start_new_thread", refuse)
    assert thread_limit.is_reached() == is_reached


def test_a_background_job_goes_on():
    code, out, err = call(
        AT_IMPORT.format(moment="fire") + CONSOLE_SCRIPT,
        *("plan", "Llama3.2-1B"),
        prepare=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert (code, err) == (0, "") and "Llama3.2-1B" in out


# ---- a limit on threads


def limited(*words: str | Path) -> tuple[int, str, str]:
    """Run a command line that cannot start threads. Root drops rights: no limit applies to it."""
    command = [sys.executable, "-m", "llama_ref", *map(str, words)]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv: root is subject to no limit")
        command = ["setpriv", "--ruid", "65534", "--bounding-set=-sys_resource,-sys_admin", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, preexec_fn=allow_no_thread)
    if "setpriv: " in done.stderr:
        pytest.skip(f"root cannot give up its rights here: {done.stderr}")
    return done.returncode, done.stdout, done.stderr


def allow_no_thread() -> None:
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))


@pytest.mark.skipif(sys.platform != "linux", reason="the limit counts threads on Linux only")
def test_too_few_threads_are_one_line(tiny):
    assert limited("verify", tiny) == (1, "", f"llama-ref: {thread_limit.MESSAGE}\n")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit counts threads on Linux only")
def test_too_few_threads_for_numpy_are_no_interrupt(tiny):
    """If numpy uses OpenBLAS on several cores, OpenBLAS prints its own lines and raises SIGINT."""
    code, out, err = limited("info", tiny)
    if code == 0:
        pytest.skip("numpy starts no thread here")
    assert (code, out) == (1, "") and err.splitlines()[-1] == f"llama-ref: {thread_limit.MESSAGE}"
    assert "Traceback" not in err
