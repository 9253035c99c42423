"""A folder that is being replaced is whole at any moment, however the run ends."""

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from attempts import attempts
from conftest import REPOSITORY
from llama_ref.checkpoint.formats import atomic, exchange
from llama_ref.checkpoint.formats.atomic import new_folder
from llama_ref.errors import CheckpointError

NAMES = ("params.json", "tokenizer.model", "consolidated.00.pth")

# Replaces a folder again and again; all files of a version hold the same word: one, two, three ...
REPLACE = textwrap.dedent("""
    import errno, sys
    from pathlib import Path
    from llama_ref.checkpoint.formats import exchange
    from llama_ref.checkpoint.formats.atomic import new_folder

    path, names, can_exchange = Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3] == "True"
    if not can_exchange:
        def refuse(a, b):
            raise OSError(errno.ENOSYS, "not here")
        exchange.exchange = refuse
    for turn in range(10**6):
        with new_folder(path, force=True) as folder:
            for name in names:
                (folder / name).write_text(str(turn))
        print(turn, flush=True)
""")


def write(path: Path, text: str, **options: bool) -> None:
    with new_folder(path, **options) as folder:
        for name in NAMES:
            (folder / name).write_text(text)


def content(path: Path) -> str:
    """The text of a folder's files, which must all be equal."""
    assert sorted(entry.name for entry in path.iterdir()) == sorted(NAMES)
    (text,) = {(path / name).read_text() for name in NAMES}
    return text


@pytest.fixture(params=["exchange", "two renames"])
def can_exchange(request, monkeypatch) -> bool:
    if request.param == "two renames":

        def refuse(a: Path, b: Path) -> None:
            raise OSError(errno.ENOSYS, "not here")

        monkeypatch.setattr(exchange, "exchange", refuse)
    return request.param == "exchange"


@pytest.mark.attack
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda kill: kill.name)
def test_a_run_that_is_killed_while_it_replaces_a_folder_leaves_a_whole_one(tmp_path, can_exchange, kill):
    path, dice = tmp_path / "model", random.Random(0)
    for _ in range(attempts(4)):
        command = [sys.executable, "-c", REPLACE, path, " ".join(NAMES), str(can_exchange)]
        with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
            run.stdout.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                run.wait(timeout=dice.random() / 50)
            run.send_signal(kill)
            run.stdout.read()
        atomic.recover(path)  # what the next run for the same path does first
        content(path)
    write(path, "last", force=True)
    assert content(path) == "last"
    left = [entry.name for entry in tmp_path.iterdir() if entry != path and not entry.name.endswith(".new")]
    assert left == []


def test_the_old_folder_stays_when_the_new_one_fails(tmp_path, can_exchange):
    path = tmp_path / "model"
    write(path, "old")
    with pytest.raises(ZeroDivisionError), new_folder(path, force=True) as folder:
        (folder / "params.json").write_text("new")
        1 / 0  # noqa: B018
    assert content(path) == "old" and list(tmp_path.iterdir()) == [path]


def test_the_old_folder_is_back_when_the_new_one_cannot_be_renamed(tmp_path, monkeypatch):
    """Where folders cannot be exchanged, the second of two renames fails."""
    path, rename = tmp_path / "model", Path.rename
    write(path, "old")

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".partial" and target == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(exchange, "_swap", lambda: None)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(CheckpointError, match=r"cannot write .*model: Input/output error"):
        write(path, "new", force=True)
    assert content(path) == "old" and list(tmp_path.iterdir()) == [path]


def test_an_old_folder_that_cannot_come_back_is_kept_for_the_next_run(tmp_path, monkeypatch):
    """Ctrl-C between two renames, and again while the old folder is renamed back."""
    path, rename = tmp_path / "model", Path.rename
    write(path, "old")

    def interrupted(self: Path, target: Path) -> Path:
        if target == path:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(exchange, "_swap", lambda: None)
        patched.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(path, "new", force=True)
    atomic.recover(path)
    assert content(path) == "old"


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    synced: list[str] = []
    fsync, place = os.fsync, exchange.replace_folder
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(Path(f"/proc/self/fd/{file}").resolve().name), fsync(file)))
    monkeypatch.setattr(atomic, "replace_folder", lambda new, *rest: (synced.append("named"), place(new, *rest)))
    write(tmp_path / "model", "new")
    before, after = synced[: synced.index("named")], synced[synced.index("named") + 1 :]
    assert {*NAMES} < {*before} and before[-1].endswith(".partial") and after == [tmp_path.name]


def test_what_killed_runs_left_is_cleaned_up_with_a_word(tmp_path, caplog):
    caplog.set_level("INFO")
    path, code = tmp_path / "model", "0123456789abcdef" * 2
    for suffix in (".partial", ".new"):
        (tmp_path / f".model.{code}{suffix}").mkdir()
    os.utime(tmp_path / f".model.{code}.new", (0, 0))
    (tmp_path / f".model.{code[::-1]}.new").mkdir()  # of a run that has just started
    (tmp_path / f".other.{code}.partial").mkdir()
    write(path, "new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        f".model.{code[::-1]}.new",
        f".other.{code}.partial",
        "model",
    ]
    assert sum("which an interrupted run left" in message for message in caplog.messages) == 2


def test_a_folder_that_a_killed_run_had_renamed_comes_back(tmp_path, caplog):
    write(tmp_path / "model", "old")
    (tmp_path / "model").rename(tmp_path / f".model.{'0' * 32}.old")
    atomic.recover(tmp_path / "model")
    assert content(tmp_path / "model") == "old"
    assert caplog.messages == [f"restored {tmp_path / 'model'}, which an interrupted run had renamed"]


def test_a_file_keeps_the_permissions_of_the_one_that_it_replaces(tmp_path):
    path = tmp_path / "conversation.json"
    path.write_text("old")
    path.chmod(0o600)
    with atomic.atomic_file(path) as file:
        assert os.fstat(file.fileno()).st_mode & 0o777 == 0o600, "others read it before it is renamed"
        file.write(b"new")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o600)


def test_a_file_that_a_killed_run_left_is_removed_and_does_not_keep_force_away(tmp_path):
    folder = tmp_path / "model"
    write(folder, "old")
    left, young = (folder / f".checklist.{digit * 32}.partial" for digit in "ab")
    other = folder / f".another.{'c' * 32}.partial"
    for path in (left, young, other):
        path.write_text("half")
    for path in (left, other):
        os.utime(path, (0, 0))
    with atomic.atomic_file(folder / "checklist.chk") as file:
        file.write(b"sums")
    assert not left.exists() and young.exists() and other.exists()
    (folder / "checklist.chk").unlink()
    write(folder, "new", force=True)
    assert content(folder) == "new"
