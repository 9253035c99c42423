"""`llama-ref completion` in real shells."""

import os
import pty
import select
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import exit_code
from llama_ref.cli import commands

LINES = [
    ("llama-ref com", {"complete", "completion"}),
    ("llama-ref complete x --verify ", {"auto", "always", "never"}),
    ("llama-ref convert a b --to=", {"hf", "meta"}),
    ("llama-ref completion ", {"bash", "zsh", "fish"}),
    ("llama-ref lens x y --t", {"--target", "--top", "--tokenizer_path"}),
    ("llama-ref quantize a b --no", {"--no-calibrate"}),
    ("llama-ref info Llama3.2-", {"Llama3.2-1B", "Llama3.2-3B"}),
    ("llama-ref --v", {"--version"}),
]


@pytest.fixture
def script(tmp_path, capsys) -> Callable[[str], Path]:
    """The script that a shell loads."""

    def script(shell: str) -> Path:
        assert exit_code(["completion", shell]) == 0
        path = tmp_path / f"completion.{shell}"
        path.write_text(capsys.readouterr().out)
        return path

    return script


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """A home directory with two releases."""
    for name in ("Llama3.2-1B", "Llama3.2-3B"):
        (tmp_path / ".llama" / "checkpoints" / name).mkdir(parents=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LLAMA", "XDG"))}
    return kept | {"HOME": str(tmp_path), "TERM": "dumb", "COLUMNS": "100"}


def in_bash(path: Path, line: str, environment: dict[str, str]) -> set[str]:
    words = shlex.split(line.replace("=", " = ")) + ([""] if line[-1] in " =" else [])
    asked = f'source {path}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _llama_ref; printf "%s\\n" "${{COMPREPLY[@]}}"'
    command = ["bash", "-euc", asked, "bash", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


def in_fish(path: Path, line: str, environment: dict[str, str]) -> set[str]:
    command = ["fish", "--no-config", "-c", f"source {path}; complete -C {shlex.quote(line)}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    offered = {each.partition("\t")[0] for each in done.stdout.splitlines()}
    return {each.rpartition("=")[2] for each in offered}


@pytest.mark.parametrize(("line", "expected"), LINES, ids=[line for line, _ in LINES])
@pytest.mark.parametrize(("shell", "ask"), [("bash", in_bash), ("fish", in_fish)])
def test_commands_flags_choices_and_checkpoints_are_offered(script, environment, shell, ask, line, expected):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    offered = ask(script(shell), line, environment)
    assert {each.rstrip("/") for each in offered} >= expected
    if line.startswith("llama-ref com"):
        assert offered == expected


@pytest.mark.parametrize(("shell", "ask"), [("bash", in_bash), ("fish", in_fish)])
def test_a_name_is_completed_and_not_run(script, environment, shell, ask, tmp_path):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    name = "$(>$RAN)`>$RAN`"
    (tmp_path / ".llama" / "checkpoints" / name).mkdir()
    offered = ask(script(shell), "llama-ref info ", environment | {"RAN": str(tmp_path / "ran")})
    quoted = r"\$\(\>\$RAN\)\`\>\$RAN\`" if shell == "bash" else name  # fish quotes it when it is put into the line
    assert offered >= {"Llama3.2-1B", quoted}
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
@pytest.mark.parametrize(("line", "expected"), LINES, ids=[line for line, _ in LINES])
def test_zsh_offers_the_same(script, environment, line, expected, tmp_path):
    """Run on a pseudo-terminal: zsh completes only at a terminal."""
    path = script("zsh")
    pid, descriptor = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execvpe("zsh", ["zsh", "-f", "-i"], environment | {"PS1": "READY> "})

    def read_until(*texts: str) -> str:
        shown, deadline = "", time.monotonic() + 60
        while not all(text in shown for text in texts):
            assert time.monotonic() < deadline, f"zsh shows {shown!r}, not {texts}"
            if select.select([descriptor], [], [], 1)[0]:
                shown += os.read(descriptor, 1 << 16).decode(errors="replace")
        return shown

    try:
        read_until("READY> ")
        setup = f"autoload -Uz compinit; compinit -u -D; source {path}; print LOA''DED"
        os.write(descriptor, f"{setup}\n".encode())
        read_until("LOADED", "READY> ")
        os.write(descriptor, f"{line}\t\t".encode())
        rest = {each.removeprefix(line.split()[-1]) if len(expected) == 1 else each for each in expected}
        read_until(*rest)
    finally:
        os.close(descriptor)
        os.kill(pid, 9)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_and_flag_is_in_every_script(script, shell):
    text = script(shell).read_text()
    for name in commands.names():
        assert name in text
        for each in commands.load(name).parameters.values():
            flag = f"-l {each.name} " if shell == "fish" else f"--{each.name}"
            assert each.positional or flag in text
