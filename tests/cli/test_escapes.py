"""Texts send no commands to a terminal: hostile names and output on a pseudo-terminal."""

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest

from conftest import exit_code
from folders import talking_folder, tiny_folder
from llama_ref.cli import commands
from llama_ref.cli.terminal import live_progress, note
from llama_ref.formatting import escape_controls

HOSTILE = "evil\x1b]0;owned\x07\x1b[2J\x1b[7m\r\x7f\x9b2J\u202etxt\u2066"
SHOWN = r"evil\x1b]0;owned\x07\x1b[2J\x1b[7m\r\x7f\x9b2J\u202etxt\u2066"
RICH = re.compile(r"\x1b\[(\?25[lh]|1A|2K|[0-689][0-9;]*m)|\r")  # cursor, lines and colors; \x1b[7m is not ours
COMMANDS_TO_TERMINAL = re.compile(r"[^\n\t -~\u00a0-\u2029\u202f-\u2065\u206a-\ud7ff\ue000-\U0010ffff]")


class Screen:
    """The other end of a pseudo-terminal: collects what was sent to it."""

    def __init__(self, leader: int):
        self.leader, self.sent = leader, b""
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        try:
            while part := os.read(self.leader, 1 << 16):
                self.sent += part
        except OSError:  # Linux: the other end is closed
            pass

    def text(self, stream: TextIO) -> str:
        """Close the stream; return all output without rich's commands, with plain newlines."""
        stream.close()
        self.reader.join(10)
        return RICH.sub("", self.sent.decode().replace("\r\n", "\n"))


@pytest.fixture
def on_terminal(monkeypatch) -> Iterator[Callable[..., str]]:
    """Call a function with stdout and stderr on a terminal; return what was sent to it."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 400, 0, 0))
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "400"}.items():
        monkeypatch.setenv(name, value)
    screen = Screen(leader)

    def call(function: Callable[..., object], *arguments: object) -> str:
        stream = os.fdopen(follower, "w", encoding="utf-8", buffering=1)
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, stream)
        try:
            function(*arguments)
        finally:
            monkeypatch.undo()
        return screen.text(stream)

    yield call
    os.close(leader)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("names") / "checkpoints"
    root.mkdir()
    return tiny_folder(root / HOSTILE)


# Arguments by command; FOLDER is the hostile folder, OUT one to write. HOSTILE must be escaped.
WORDS = {
    "ablate": ("FOLDER", HOSTILE),
    "attention": ("FOLDER", "a\x1b[2Jb"),
    "attribute": ("FOLDER", "a", "--target", "\x1b[7m"),
    "bench": ("OUT",),
    "chat": ("FOLDER", "--max_gen_len", "4"),
    "checksum": ("FOLDER", "--force"),
    "collect": ("FOLDER", "OUT", "--names", "logits", "--to", "OUT"),
    "complete": ("FOLDER", HOSTILE, "--echo", "--max_gen_len", "4"),
    "completion": ("bash",),
    "convert": ("FOLDER", "OUT", "--to", "hf"),
    "demo": ("--out", "FOLDER"),
    "diff": ("FOLDER", "OTHER"),
    "download": ("Llama3.2-1B", "--file", "OUT"),
    "evaluate": ("OUT", "--tasks", "a"),
    "features": ("FOLDER", "OUT", HOSTILE),
    "guard": ("FOLDER", HOSTILE, "--guard_version", "3-1B", "--show_prompt"),
    "info": ("FOLDER",),
    "lens": ("FOLDER", HOSTILE, "--target", "z", "--out", "OUT.html"),
    "link": ("--file", "OUT"),
    "list": (),
    "norms": ("FOLDER", HOSTILE),
    "patch": ("FOLDER", "a\x1b", "b\x1b", "--target", "\x1b"),
    "perplexity": ("FOLDER", "OUT"),
    "plan": ("FOLDER", "--gpu_memory", "24"),
    "quantize": ("FOLDER", "OUT", "--to", "int8", "--nocalibrate"),
    "reshard": ("FOLDER", "OUT", "--shards", "2"),
    "rope": ("FOLDER",),
    "saliency": ("FOLDER", HOSTILE, "--target", "z", "--out", "OUT.html"),
    "spectra": ("FOLDER",),
    "tune_lens": ("FOLDER", "OUT", "--to", "OUT"),
    "verify": ("FOLDER",),
}
WITHOUT_NAMES = {"ablate", "attention", "attribute", "completion", "norms", "patch", "rope", "spectra"}


@pytest.mark.parametrize("name", commands.names())
def test_no_name_and_no_text_sends_commands(name, folder, tmp_path, monkeypatch, on_terminal):
    places = {"FOLDER": folder, "OUT": tmp_path / HOSTILE, "OUT.html": tmp_path / f"{HOSTILE}.html"}
    if "OTHER" in WORDS[name]:
        places["OTHER"] = tiny_folder(tmp_path / HOSTILE, seed=2)
    words = [name, *(str(places.get(word, word)) for word in WORDS[name])]
    monkeypatch.setenv("LLAMA_MODELS_CONFIG_DIR", str(folder.parents[1]))
    lines = f"{HOSTILE}\n/system {HOSTILE}\n/load {HOSTILE}\n/{HOSTILE}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines.replace("\r", "\\r")))
    sent = on_terminal(exit_code, words)
    assert COMMANDS_TO_TERMINAL.findall(sent) == []
    assert (SHOWN in sent.replace("\n", "")) == (name not in WITHOUT_NAMES)


# ---- the model's own text

ANSWER = "[\x1b]0;\x07\r\x7f\x9b\u202e\txक"
ANSWER_SHOWN = "[\\x1b]0;\\x07\\r\\x7f\\x9b\\u202e\txक"


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Path:
    return talking_folder(tmp_path_factory.mktemp("talker") / "Talker", ANSWER)


def test_a_models_text_is_escaped_on_a_terminal(talker, monkeypatch, on_terminal):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    sent = on_terminal(exit_code, ["chat", str(talker), "-t", "0", "-n", "40"])
    assert COMMANDS_TO_TERMINAL.findall(sent) == [] and f"\n{ANSWER_SHOWN}\n[" in sent


def test_a_pipe_gets_a_models_text_as_it_is(talker, tmp_path, monkeypatch):
    with (tmp_path / "out").open("w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert exit_code(["complete", str(talker), "hello\n", "-t", "0", "-n", "40"]) == 0
    assert (tmp_path / "out").read_bytes() == f"{ANSWER}\n".encode()


@pytest.mark.skipif(sys.platform == "darwin", reason="all names are UTF-8 there")
def test_a_pipe_gets_a_path_as_it_is(folder, tmp_path, monkeypatch):
    target = os.fsencode(tmp_path / HOSTILE) + b"\xff\x80"
    with (tmp_path / "out").open("w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert exit_code(["reshard", str(folder), os.fsdecode(target), "--shards", "1"]) == 0
    assert (tmp_path / "out").read_bytes() == target + b"\n"


# ---- the streams


def test_a_line_above_a_progress_bar_is_escaped(on_terminal):
    def notes() -> None:
        from llama_ref.cli.outcome import configure_stdio

        configure_stdio()
        with live_progress() as bar:
            task = bar.add_task("")
            note(HOSTILE)
            print(HOSTILE)
            bar.update(task, completed=1)
        print("after", HOSTILE)

    sent = on_terminal(notes)
    assert COMMANDS_TO_TERMINAL.findall(sent) == [] and sent.count(SHOWN) == 3


def test_what_scripts_need_stays():
    for text in ("가\tनहीं क्\u200dष\n", "👩\u200d🚀 ❤️", "\u05d0\u200f(\u200e1)", "é\u0301 \xa0\u2028"):
        assert escape_controls(text) == text
    assert escape_controls("a\udc9bb\x85c\u2069") == r"a\udc9bb\x85c\u2069"
