"""Every command in the READMEs is run here, and what they show is what it prints.

A ```console block holds `$ command` lines and their output; `…` in an output line stands for what differs from run to run.
They run in the repository, with the demo checkpoint also standing under the releases' names in ~/.llama/checkpoints. Blocks
of ```python are run as scripts. What cannot be run inside the tests stands in a ```sh block, and is named below with why.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY

READMES = ("README.md", "README.ko.md")
NOT_RUN = {
    "pip install ./llama_ref": "it would install over the package that is being tested",
    "bash scripts/test.sh": "it is what runs this test",
    "bash scripts/test.sh tests/parity -k logits": "it is what runs this test",
}
RELEASES = ("Llama3.2-1B-Instruct", "Llama3.2-1B")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    """(README's name, text) of every block in this language."""
    texts = ((name, (REPOSITORY / name).read_text(encoding="utf-8")) for name in READMES if (REPOSITORY / name).exists())
    return [(name, body) for name, text in texts for kind, body in BLOCK.findall(text) if kind == language]


def sessions() -> list:
    """(command, expected output) of every `$` line in order, each once."""
    out = {}
    for name, body in blocks("console"):
        for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            out.setdefault((command, output), name)
    return [pytest.param(*session, id=f"{name}: {session[0]}") for session, name in out.items()]


@pytest.fixture(scope="module")
def environment(tmp_path_factory, demo_folder) -> dict[str, str]:
    """A newcomer's: an empty home but for two downloaded releases."""
    for place in {place for _, body in blocks("console") for place in re.findall(r"/tmp/[\w-]+", body)}:
        shutil.rmtree(place, ignore_errors=True)  # of a run that was broken off
    home = tmp_path_factory.mktemp("home")
    for name in RELEASES:
        folder = home / ".llama" / "checkpoints" / name
        folder.mkdir(parents=True)
        for file in demo_folder.iterdir():
            os.link(file, folder / file.name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LLAMA", "XDG", "PYTHON"))}
    return kept | {"HOME": str(home), "PATH": path, "COLUMNS": "120", "TERM": "dumb", "TMPDIR": str(home)}


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(("command", "expected"), sessions())
def test_a_command_does_what_the_readme_shows(command, expected, environment):
    done = run(["bash", "-c", f"({command}) 2>&1"], environment)
    pattern = re.escape(expected.strip()).replace("…", ".*")
    assert (done.returncode != 0) == expected.startswith("llama-ref: "), done.stdout
    assert re.fullmatch(pattern, done.stdout.strip(), re.DOTALL), f"{command} printed\n{done.stdout}\nnot\n{expected}"


@pytest.mark.parametrize("script", [pytest.param(body, id=f"{name}: {body[:40]!r}") for name, body in blocks("python")])
def test_a_script_runs(script, environment):
    done = run([sys.executable, "-c", script], environment)
    assert done.returncode == 0, done.stderr


def test_what_is_not_run_is_known_not_to_be():
    lines = {line for _, body in blocks("sh") for line in body.splitlines() if line and not line.startswith("#")}
    assert lines <= NOT_RUN.keys()


def test_the_table_of_states_names_every_state():
    from llama_ref.checkpoint.verify.report import State

    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert [state for state in State if f"| {state} |" not in text] == []


def test_the_table_of_releases_names_every_release():
    from llama_ref.checkpoint.releases import RELEASES as known

    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert [name for name in known if f"`{name}`" not in text] == []


def test_every_link_to_a_file_leads_to_one():
    links = [
        (name, target)
        for name in READMES
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", (REPOSITORY / name).read_text(encoding="utf-8"))
    ]
    assert len(links) > 20 and [link for link in links if not (REPOSITORY / link[1]).exists()] == []
