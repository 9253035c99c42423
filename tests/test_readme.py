"""README.md, README.ko.md and docs/: commands run and print what is shown, and links work.

- ```console blocks hold `$ command` lines and their output. They run in the repository, in order,
  with the demo checkpoint also under the names of two releases in ~/.llama/checkpoints. `…` in an
  output stands for anything. Times and speeds may differ, and so may the widths of columns.
- ```python blocks run as scripts. A ```text block right after one is what it prints.
- ```sh and ```bash blocks are not run. A comment above each says why: `<!-- needs a GPU -->`.
  Their commands, and those within sentences, are checked: the script exists and knows the flags.

docs/tour.md has tests of its own (test_tour.py).
"""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import REPOSITORY

RELEASES = ("Llama3.2-1B-Instruct", "Llama3.2-1B")
AS_USUAL = re.compile(r"README\.md|docs/generate\.md: torchrun .*text_completion")
OF_OTHER_TESTS = {"tour.md"}
DOCUMENTS = {
    str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8")
    for path in [
        REPOSITORY / "README.md",
        REPOSITORY / "README.ko.md",
        *sorted((REPOSITORY / "docs").glob("*.md")),
    ]
    if path.name not in OF_OTHER_TESTS
}
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SCRIPT = re.compile(r"^```python\n(.*?)^```$(?:\n+```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"(?:^<!-- (\w[^\n]+) -->\n)?^```(?:sh|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)

VARYING = (
    (r"(?m)^== .*\n", ""),  # output of the scripts while they make an environment
    (r"[\d.,]+ [kMGT]?B/s", "SPEED"),
    (r"[\d.,]+ tokens/s", "SPEED"),
    (r"(?<![\w.])[\d.,]+ (?:s|ms|seconds)\b", "TIME"),
    (r"[─━]+", "─"),
    (r"[ \t]+", " "),
    (r" ?\n ?", "\n"),
)


# ---- parts of the documents


def sessions() -> list:
    """(command, expected output, whether it is started as usual) of every `$` line in order, each once.

    README.md's are, and one job; others need not import torch, which takes a second (tests/warm.py).
    """
    out = {}
    for name, text in DOCUMENTS.items():
        for body in CONSOLE.findall(text):
            for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
                command, output = split_continued(part)
                out.setdefault((command, output), name)
    ids = {session: f"{name}: {session[0]}" for session, name in out.items()}
    return [pytest.param(*session, AS_USUAL.match(id) is not None, id=id) for session, id in ids.items()]


def split_continued(part: str) -> tuple[str, str]:
    """Split a command, which a backslash continues on the next line, from its output."""
    lines = part.splitlines(keepends=True)
    n = next(i for i, line in enumerate(lines, 1) if not line.endswith("\\\n"))
    return "".join(lines[:n]).strip(), "".join(lines[n:])


def scripts() -> list:
    """(script, expected output or None) of every Python block; translations only once."""
    out = {}
    for name, text in DOCUMENTS.items():
        for script, output in SCRIPT.findall(text):
            said = pytest.param(script, output or None, id=f"{name}: {script[:40]!r}")
            out.setdefault((re.sub(r" *# .*", "", script), output), said)
    return list(out.values())


def commands_not_run() -> list[tuple[str, str]]:
    """(document, command) of the commands in sh blocks and within sentences."""
    found = []
    for name, text in DOCUMENTS.items():
        for _, body in NOT_RUN.findall(text):
            lines = body.replace("\\\n", " ").splitlines()
            found += [(name, line) for line in lines if line and not line.startswith("#")]
        prose = BLOCK.sub("", text)
        found += [(name, code.replace("\n", " ")) for code in re.findall(r"`([^`]+)`", prose)]
    return [(name, code) for name, code in found if re.match(r"llama-ref [a-z]|python |torchrun |bash ", code)]


# ---- running


@pytest.fixture(scope="module")
def environment(tmp_path_factory, demo_folder) -> Iterator[dict[str, str]]:
    """A new user's environment: a home with two downloaded releases; TMPDIR stands for /tmp."""
    # A short path, as a new user's is: a table as narrow as `list`'s would wrap a longer one.
    with tempfile.TemporaryDirectory(prefix="h", ignore_cleanup_errors=True) as home:
        yield environment_of(Path(home), tmp_path_factory.mktemp("t"), demo_folder)


def environment_of(home: Path, scratch: Path, demo_folder: Path) -> dict[str, str]:
    releases = home / ".llama" / "checkpoints"
    # Not linked: a link that appears or vanishes changes the file's ctime, which loading watches.
    shutil.copytree(demo_folder, releases / RELEASES[0])
    for name in RELEASES[1:]:
        (releases / name).symlink_to(releases / RELEASES[0])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = ("LLAMA", "XDG", "PYTHON")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(own)}
    return kept | {
        "HOME": str(home),
        "PATH": path,
        "COLUMNS": "120",
        "TERM": "dumb",
        "TMPDIR": str(scratch),
    }


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository; the documents' /tmp and /home/me are folders of this run."""
    places = {
        "/home/me/llama_ref": str(REPOSITORY),
        "/home/me": environment["HOME"],
        "/tmp": environment["TMPDIR"],
    }
    *words, text = command
    words.append(re.sub(r"/tmp(?=/)", places["/tmp"], text))
    done = subprocess.run(
        words,
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
        check=False,
    )
    for name, place in places.items():
        done.stdout = done.stdout.replace(place, name)
    return done


def matches(printed: str, expected: str) -> bool:
    """Whether an output equals the document's, except times, speeds, widths and `…`."""
    for pattern, word in VARYING:
        printed = re.sub(pattern, word, printed)
        expected = re.sub(pattern, word, expected)
    pattern = re.escape(expected.strip()).replace("…", ".*")
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


@pytest.mark.parametrize(("command", "expected", "as_usual"), sessions())
def test_a_command_does_what_is_shown(command, expected, as_usual, environment, warm):
    path = f"{warm}{os.pathsep}{environment['PATH']}"
    done = run(["bash", "-c", f"({command}) 2>&1"], environment if as_usual else environment | {"PATH": path})
    is_error = re.search(r"^llama-ref: ", expected, re.MULTILINE) is not None
    assert (done.returncode != 0) == is_error, done.stdout
    assert matches(done.stdout, expected), f"{command} printed\n{done.stdout}\nnot\n{expected}"


@pytest.mark.parametrize(("script", "expected"), scripts())
def test_a_script_runs(script, expected, environment, warm):
    done = run([str(warm / "python"), "-c", script], environment)
    assert done.returncode == 0, done.stderr
    if expected is not None:
        assert matches(done.stdout, expected), f"printed\n{done.stdout}\nnot\n{expected}"


def test_outputs_differ_by_times_and_speeds_alone():
    assert matches("a  12 MB/s  0.2 s\n───", "a 7.5 GB/s 1,000 s\n─────\n")
    assert matches("one\ntwo\nthree", "one\n…\nthree")
    assert not matches("12 tokens", "13 tokens")
    assert not matches("one\ntwo", "one")


# ---- commands that are not run


def test_every_block_that_is_not_run_says_why():
    silent = [(name, body) for name, text in DOCUMENTS.items() for reason, body in NOT_RUN.findall(text) if not reason]
    assert silent == []


def test_there_are_no_blocks_of_another_kind():
    known = {"console", "python", "sh", "bash", "text", ""}
    kinds = {(name, kind) for name, text in DOCUMENTS.items() for kind in re.findall(r"^```(\w*)$", text, re.MULTILINE)}
    assert {(name, kind) for name, kind in kinds if kind not in known} == set()


def test_commands_that_are_not_run_name_scripts_and_flags_that_exist(environment, warm):
    wrong = []
    for name, code in commands_not_run():
        words = shlex.split(code)
        file = next((word for word in words if word.startswith("scripts/")), None)
        if file is not None and not (REPOSITORY / file).exists():
            wrong.append((name, code, f"there is no {file}"))
            continue
        if words[0] == "llama-ref":
            known = help_of(warm, words[1])
        elif file is not None and file.endswith(".py"):
            known = (REPOSITORY / file).read_text(encoding="utf-8") + help_of(warm, "complete")
        else:
            continue
        begin = words.index(file) if file else 0
        flags = [word.partition("=")[0] for word in words[begin:] if word.startswith("--")]
        wrong += [(name, code, flag) for flag in flags if flag.strip("-") not in known]
    assert wrong == []


@functools.cache
def help_of(warm: Path, command: str) -> str:
    done = subprocess.run([warm / "llama-ref", command, "--help"], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout + done.stderr


# ---- tables and links


def test_the_table_of_states_names_every_state():
    from llama_ref.checkpoint.verify.report import State

    text = DOCUMENTS["docs/verify.md"]
    assert [state for state in State if f"| {state} |" not in text] == []


def test_the_table_of_releases_names_every_release():
    from llama_ref.checkpoint.releases import RELEASES as known

    text = DOCUMENTS["docs/releases.md"]
    assert [name for name in known if f"`{name}`" not in text] == []


def test_the_table_of_commands_names_every_command(environment):
    done = run([sys.executable, "-m", "llama_ref.cli", "--help"], environment)
    commands = set(re.findall(r"^ {2,6}([a-z_]+)(?: {2,}.*)?$", done.stdout + done.stderr, re.MULTILINE))
    assert len(commands) > 15
    for name in ("README.md", "README.ko.md"):
        missing = {word for word in commands if f"`{word}`" not in DOCUMENTS[name]}
        assert missing == set(), name


def test_the_map_names_every_folder_once_and_every_file_at_the_top():
    text = DOCUMENTS["docs/architecture.md"]
    package = REPOSITORY / "llama_ref"
    rooms = {path.parent for path in package.rglob("*.py")} - {package}
    links = [f"[`{path.relative_to(package)}/`](" for path in rooms]
    links += [f"[`{path.name}`](" for path in package.glob("[a-z]*.py")]
    assert {link: text.count(link) for link in links} == dict.fromkeys(links, 1)


def test_both_readmes_have_the_same_sections_tables_and_figures():
    def outline(name: str) -> tuple[int, int, list[str]]:
        prose = BLOCK.sub("", DOCUMENTS[name])
        headings, rows = (len(re.findall(start, prose, re.MULTILINE)) for start in (r"^#+ ", r"^\|"))
        return headings, rows, sorted(re.findall(r"\d+[.,]\d+|\d{3,}", prose))

    assert outline("README.ko.md") == outline("README.md")


def test_readme_is_short():
    assert len(DOCUMENTS["README.md"].split()) <= 900


def linked() -> dict[Path, str]:
    files = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]
    return {path: path.read_text(encoding="utf-8") for path in files}


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    out: set[str] = set()
    for title in re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE):
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        n = 0
        while (name := f"{slug}-{n}" if n else slug) in out:
            n += 1
        out.add(name)
    return out


def test_every_link_leads_to_a_file_and_a_heading():
    texts = linked()
    count, broken = 0, []
    for path, text in texts.items():
        prose = BLOCK.sub("", text)
        targets = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose)
        for target in targets:
            if re.match(r"https?:|mailto:", target):
                continue
            count += 1
            file, _, anchor = target.partition("#")
            place = (path.parent / file).resolve() if file else path
            is_there = place.exists() and (not anchor or anchor in anchors(texts.get(place, "")))
            if not is_there:
                broken.append((path.name, target))
    assert count > 100 and broken == []


def test_every_page_can_be_reached_from_the_readme():
    texts = linked()
    found, todo = set(), [REPOSITORY / "README.md"]
    while todo:
        path = todo.pop()
        if path in found or path not in texts:
            continue
        found.add(path)
        links = re.findall(r"\]\(([^)#\s]+)", texts[path])
        todo += [(path.parent / link).resolve() for link in links if link.endswith(".md")]
    assert set((REPOSITORY / "docs").glob("*.md")) <= found
