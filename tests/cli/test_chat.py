"""`llama-ref chat`: turns, commands, pipes, and Ctrl-C at a real terminal."""

import codecs
import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable

import pytest

from conftest import exit_code
from guard_folders import guard_folder
from llama_ref.cli import chat
from llama_ref.generation import Llama
from llama_ref.session import Session
from scripted import scripted

SUM = "What is 2+2?"
BRIEF = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": SUM}]
GREEDY = {"temperature": 0, "max_gen_len": 8}


@pytest.fixture
def session(llama) -> Session:
    return Session(Llama(llama.model, llama.tokenizer, max_seq_len=128))


@pytest.fixture
def talk(session, monkeypatch, capsys) -> Callable[..., tuple[str, str]]:
    """Pipe lines into the conversation; return (stdout, stderr)."""

    def pipe(*lines: str, end: str = "\n", **options) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + end))
        chat.chat(session, GREEDY | options)
        return capsys.readouterr()

    return pipe


# ---- through a pipe


def test_calls_are_shown_and_results_typed(shallow, monkeypatch, capsys):
    call = "[add(a=2, text='\x1b[1m'), mul()]<|eot_id|>"
    llama = scripted(shallow, [call, "It is 5.<|eot_id|>"], monkeypatch)
    session = Session(llama, tools=[{"name": "add"}])
    lines = ("/result early", SUM, "/result 5", "/result none such")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    chat.chat(session, GREEDY | {"max_gen_len": 64})
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "It is 5."
    told = [line for line in err.splitlines() if "tokens in" not in line and "not trained" not in line]
    assert told[:4] == [
        "the last answer calls no tool, so /result has nothing to answer",
        "[call: add(a=2, text='\\x1b[1m')]",
        "[call: mul(), which was not offered]",
        "1 of 2 results",
    ]
    assert [message["content"] for message in session.dialog if message["role"] == "tool"] == ["5", "none such"]


def test_a_tools_file_is_read_before_the_model(tmp_path, capsys):
    file = tmp_path / "tools.json"
    for text, message in (("{}", "expected a list of functions"), ('["google"]', "not a built-in tool"), ("[", "tools.json")):
        file.write_text(text)
        assert exit_code(["chat", str(tmp_path / "no model"), "--tools", str(file)]) == 2
        assert message in capsys.readouterr().err
    for name in (str(tmp_path / "none.json"), "~nobody-here/tools.json", ""):
        assert exit_code(["chat", str(tmp_path / "no model"), "--tools", name]) == 2
        assert f"cannot read the tools in {name}" in capsys.readouterr().err


def test_a_guard_without_a_name_is_not_no_guard(demo_folder, capsys):
    """`--guard "$GUARD"` gives an empty name if the variable is not set."""
    assert exit_code(["chat", str(demo_folder), "--guard", ""]) == 2
    assert "--guard is empty, expected a checkpoint folder" in capsys.readouterr().err


def test_each_line_is_a_turn_and_only_answers_go_to_stdout(talk, session):
    out, err = talk(SUM, "", "  ", "What is 3+3?")
    assert out == "2 + 2 = 4\n3 + 3 = 3\n"  # the model's answers
    pace = r"\[\d+ tokens in, first token after \d+\.\d\d s; 7 out, \d+\.\d tokens/s; stop\]"
    assert re.fullmatch(f"{pace}\n{pace}\n", err)
    assert [message["role"] for message in session.dialog] == ["user", "assistant"] * 2


def test_the_last_line_needs_no_newline(talk):
    assert talk(SUM, end="").out == "2 + 2 = 4\n"


def test_a_backslash_joins_lines(talk, session):
    talk("first \\", "second\\", "", "/not a command \\", end="", max_gen_len=1)
    assert session.dialog[0]["content"] == "first \nsecond\n"
    assert len(session.dialog) == 2  # joined lines that begin with a slash are one command


def test_exit_leaves_what_follows_unread(talk):
    assert talk(SUM, "/exit now", SUM).out == "2 + 2 = 4\n"


def test_nothing_in_nothing_out(talk):
    assert talk("") == ("", "")


def test_commands_answer_on_stderr(talk, session, tmp_path):
    file = tmp_path / "talk.json"
    out, err = talk("/help", "/system Be brief.", SUM, f"/save {file}", "/reset", f"/load   {file}", "/system", max_gen_len=3)
    assert out == session.llama.chat_completion([BRIEF], 0.0, max_gen_len=3)[0]["generation"]["content"] + "\n"
    told = [line for line in err.splitlines() if not line.startswith("[")]
    assert told[: len(chat.HELP.splitlines())] == chat.HELP.splitlines()
    assert told[len(chat.HELP.splitlines()) :] == [
        "conversation reset, with this system prompt",
        f"saved 3 messages to {file}",
        "conversation reset",
        f"loaded 3 messages from {file}",
        "conversation reset, without a system prompt",
    ]
    assert [message["role"] for message in json.loads(file.read_text())] == ["system", "user", "assistant"]
    assert session.dialog == []


def test_help_tells_all_commands():
    assert set(re.findall(r"^/\w+", chat.HELP, re.MULTILINE)) == set(chat.COMMANDS) - {"/help"}


def test_reset_keeps_the_system_prompt(talk, session):
    talk("/system Be brief.", SUM, "/reset", max_gen_len=1)
    assert session.dialog == [{"role": "system", "content": "Be brief."}]


def test_what_cannot_be_done_is_said_and_the_conversation_goes_on(talk):
    wrong = {
        "/bogus": "unknown command /bogus (/help lists all)",
        "/": "unknown command / (/help",
        "/ exit": "unknown command / (",
        "/rest": "unknown command /rest; did you mean /reset? (/help lists all)",
        "/save": "/save needs a file name",
        "/load  ": "/load needs a file name",
        "/load /nowhere/talk.json": "cannot read /nowhere/talk.json: No such file or directory",
        "/save /nowhere/talk.json": "cannot write /nowhere/talk.json: No such file or directory",
        "/load /dev/null": "/dev/null is not a plain file",
        "word " * 200: "tokens, but max_seq_len is 128",
    }
    out, err = talk(*wrong, SUM)
    told = err.splitlines()
    assert [message in line for message, line in zip(wrong.values(), told, strict=False)] == [True] * len(wrong), err
    assert out == "2 + 2 = 4\n"
    assert len(told) == len(wrong) + 1, "the speed of the one answer"


def test_an_interrupt_while_a_pipe_is_silent_ends_the_program(demo_folder, warm):
    words = [warm / "llama-ref", "chat", str(demo_folder), "--temperature", "0", "--max_seq_len", "128"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        process.stdin.write(SUM + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "2 + 2 = 4\n"
        process.stderr.readline()  # the speed: the turn is over
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "\n")


def take_interrupts() -> None:
    """Make Ctrl-C work again: a shell's background jobs and their children ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# ---- at a terminal


HINT = r"(\s+\(other programs used [^)]*\))?"  # on a busy machine


class Terminal:
    """`llama-ref chat` on a pseudo-terminal, which also shows stderr."""

    def __init__(self, *words: str):
        ours, theirs = pty.openpty()
        self.fd, self.screen = ours, ""
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # readline may write byte by byte
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llama_ref.cli", "chat", *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=self.take_control,
            env=os.environ | {"TERM": "dumb", "PYTHONUTF8": "1"},
        )
        os.close(theirs)

    @staticmethod
    def take_control() -> None:
        """Send Ctrl-C to the process that owns the terminal."""
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        take_interrupts()

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def wait_for(self, pattern: str, *, seconds: float = 60, pressing: str = "") -> str:
        """Read until new output on the screen matches a pattern; return the match.

        Until then, `pressing` is pressed every three seconds: a signal that arrives just before
        Python's readline waits for a key takes effect only with the next key.
        """
        begin = time.monotonic()
        presses = 0
        while not (found := re.search(pattern, self.screen)):
            waited = time.monotonic() - begin
            assert waited < seconds, f"no {pattern!r} on the screen, only {self.screen[-500:]!r}"
            if pressing and waited >= 3 * presses:
                self.type(pressing)
                presses += 1
            if select.select([self.fd], [], [], 0.5)[0]:
                self.screen += self.read(pattern)
        assert "Traceback" not in self.screen
        self.screen = self.screen[found.end() :]
        return found[0]

    def read(self, awaited: str) -> str:
        with contextlib.suppress(OSError):  # raised when the other end is closed
            if new := os.read(self.fd, 4096):
                return self.decoder.decode(new)
        pytest.fail(f"it ended before {awaited!r}, with {self.screen[-500:]!r}")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.fd)


def test_at_a_terminal_ctrl_c_breaks_off_and_ctrl_d_leaves(demo_folder):
    terminal = Terminal(str(demo_folder), "--max_seq_len", "1024", "--temperature", "0")
    try:
        terminal.wait_for(r"Type a message, or /help\.\s+> ")
        terminal.type("not meant")
        terminal.wait_for("not meant")
        terminal.wait_for(r"\(/exit or Ctrl-D leaves\)\s+> ", pressing="\x03")

        terminal.type("Write a long story about a whale.\n")
        terminal.wait_for(r"whale\.\s[^>]*\w+ \w+ \w+ \w+")  # a few words of the answer
        terminal.wait_for(rf"; interrupted\]{HINT}\s+> ", pressing="\x03")

        terminal.type("/reset\n")
        terminal.wait_for(r"conversation reset\s+> ")
        terminal.type("What is \\\n")
        terminal.wait_for("… ")
        terminal.type("2+2?\n")
        terminal.wait_for(r"4\s+\[[^\]]* out, [^\]]*; stop\]" + HINT + r"\s+> ")

        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.close()


def test_at_a_terminal_ctrl_c_drops_a_guarded_turn(demo_folder, tmp_path, shorter_tokenizer_path):
    guard = guard_folder(tmp_path / "Llama-Guard-3-1B", shorter_tokenizer_path)
    terminal = Terminal(str(demo_folder), "--max_seq_len", "1024", "--temperature", "0", "--guard", str(guard))
    try:
        terminal.wait_for(r"Type a message, or /help\.\s+> ")
        terminal.type("What is 2+2?\n")
        terminal.wait_for(r"= 4\s+\[[^\]]*; stop\]" + HINT + r"\s+> ")
        shown = ""
        while "is discarded" not in shown:  # the key may arrive before the line is read
            terminal.type("Write a long story about a whale.\n")
            terminal.wait_for(r"whale\.\s")
            shown = terminal.wait_for(r"(this turn is discarded\]|Ctrl-D leaves\))\s+> ", pressing="\x03")
        terminal.type(f"/save {tmp_path / 'talk.json'}\n")
        terminal.wait_for(r"saved 2 messages[^>]*\s> ")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.close()
