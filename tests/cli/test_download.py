"""`llama-ref link` and `llama-ref download`: output, exit codes, Ctrl-C, kill -9, no leaks."""

import json
import os
import pty
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import REPOSITORY, exit_code, parsed
from folders import tiny_folder
from loopback import Loopback, files_of, make_link, secrets_of, serve, stall, status

NAME, REMOTE, SHARD = "Llama3.2-1B-Instruct", "Llama-3.2-1B-Instruct", "consolidated.00.pth"
HOST = "llama3-1.llamameta.net"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("download") / "Tiny")


@pytest.fixture
def loopback(tiny) -> Iterator[Loopback]:
    with serve(files_of(tiny, REMOTE)) as found:
        yield found


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LLAMA_MODELS_CONFIG_DIR", str(tmp_path / "home"))
    monkeypatch.delenv("LLAMA_REF_LINK", raising=False)
    return tmp_path / "home" / "checkpoints"


@pytest.fixture
def run(root, capfd, monkeypatch) -> Run:
    """Run a command line in this process; return (exit code, stdout, stderr) without secrets."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        code = exit_code([*map(str, words)])
        out, err = capfd.readouterr()
        check_secret(out + err)
        return code, out, err

    return run


def check_secret(text: str, link: str | None = None) -> None:
    assert [secret for secret in secrets_of(link or make_link(HOST, scheme="https")) if secret in text] == []


@pytest.fixture
def fetch(run, loopback, tmp_path) -> Run:
    """Run `download` with the loopback server's link in a file."""
    file = tmp_path / "link.txt"
    file.write_text(loopback.link + "\n")

    def fetch(*words: str) -> tuple[int, str, str]:
        return run("download", *words, "--file", file, "--allow_host", loopback.host)

    return fetch


# ---- link


def test_link_says_what_it_is_good_for(run, tmp_path, root):
    file = tmp_path / "link.txt"
    file.write_text(make_link(HOST, time.time() + 7300, scheme="https"))
    code, out, err = run("link", "meta-llama/Llama-3.1-8B", "--file", file)
    assert (code, err) == (0, "")
    assert f"{HOST}, known for Llama 3.1" in out and "is good for 2 hours (until 20" in out
    assert "Llama3.1-8B, about 16.1 GB" in out and f"https://{HOST}/Llama-3.1-8B\n" in out
    assert str(root / "Llama3.1-8B") in out and "checklist.chk, params.json, tokenizer.model, consolidated.00.pth" in out

    code, out, _ = run("link", "Llama3.1-8B", "--file", file, "--json")
    told = parsed(out)
    assert code == 0 and told["estimated_bytes"] == 16060522496 and not told["has_ended"]
    assert set(parsed(run("link", "--file", file, "--json")[1])) == {"host", "known_for", "expires", "has_ended"}


def test_a_link_that_has_ended_is_exit_code_1(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_REF_LINK", make_link(HOST, time.time() - 3 * 3600 - 1, scheme="https"))
    code, out, err = run("link")
    assert (code, err) == (1, "") and "expired 3 hours ago" in out


def test_links_where_names_are_expected_are_not_shown(run, tmp_path):
    link = make_link(HOST, scheme="https")
    for words in (
        ("link", link),
        ("download", link),
        ("download", NAME, link),
        ("download", NAME, "--file", link),
        ("download", NAME, f"--file={link}"),
        ("download", NAME, "--only", link),
        ("download", NAME, "--allow_host", link),
        ("download", NAME, "--jobs", link),
        ("verify", link),
        (link,),
    ):
        code, _, err = run(*words)
        assert code == 2 and err.count("\n") == 1, words


def test_misuse(run, tmp_path):
    link = make_link(HOST, scheme="https")
    (tmp_path / "link.txt").write_text(link)
    file = ("--file", tmp_path / "link.txt")
    for words, said in (
        (("download", NAME), "missing the signed link"),
        (("download", "Llama5", *file), "unknown Llama 3 release"),
        (("download", NAME, *file, "--link", link), "--file and --link are given"),
        (("download", NAME, *file, "--repair", "--only", SHARD), "--repair and --only are given"),
        (("download", NAME, *file, "--only", "nothing"), "has no file 'nothing'"),
        (("download", NAME, *file, "--jobs", "0"), "jobs is 0"),
        (("download", NAME, "--file", tmp_path / "none"), "cannot read the link"),
        (("download", NAME, *file, "--allow_host", "https://x"), "expected HOST or HOST:PORT"),
    ):
        code, out, err = run(*words)
        assert code == 2 and out == "" and said in err, (words, err)


def test_a_link_in_an_argument_is_used_and_warned_of(run):
    code, out, err = run("link", "--link", make_link(HOST, scheme="https"))
    assert code == 0 and HOST in out and "the shell's history keeps this link" in err


def test_the_link_is_asked_for_without_echo(root):
    link = make_link(HOST, time.time() + 7300, scheme="https")
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(REPOSITORY)
        os.execv(sys.executable, [sys.executable, "-m", "llama_ref.cli", "link"])
    shown = b""
    while b"not shown" not in shown:
        shown += os.read(terminal, 1000)
    os.write(terminal, link.encode() + b"\n")
    try:
        while data := os.read(terminal, 1000):
            shown += data
    except OSError:  # Linux: the other end is closed
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert b"is good for 2 hours" in shown
    check_secret(shown.decode(), link)


# ---- download


def test_download_goes_where_list_looks(fetch, run, root, tiny):
    code, out, err = fetch(NAME)
    assert code == 0 and "all 3 files are whole" in out
    assert err.startswith("[4 files, 129 kB in ") and err.count("\n") == 1, "quiet in a pipe"
    assert f" {NAME} " in run("list")[1]
    assert {path.name: path.read_bytes() for path in (root / NAME).iterdir()} == {
        path.name: path.read_bytes() for path in tiny.iterdir()
    }
    code, out, err = fetch(NAME)
    assert code == 0 and "all 3 files are whole" in out and err == "[nothing was missing]\n"


def test_json(fetch):
    code, out, err = fetch(NAME, "--json")
    told = parsed(out)
    assert (code, err) == (0, "") and told["ok"] and told["exit_code"] == 0
    assert sorted(told["fetched"]) == ["checklist.chk", SHARD, "params.json", "tokenizer.model"]
    assert told["fetched_bytes"] > 120_000


def test_what_is_wrong_is_exit_code_1_and_repaired(fetch, root, settled):
    fetch(NAME)
    (root / NAME / "params.json").write_text("{}")
    code, out, err = fetch(NAME)
    assert code == 1 and "params.json" in out and "--repair" in err
    code, out, _ = fetch(NAME, "--repair")
    assert code == 0 and "all 3 files are whole" in out


def test_only_needs_the_list_and_no_more(fetch, root):
    code, out, _ = fetch(NAME, "--only", "params.json", "--only", "tokenizer.model")
    assert code == 0 and "all 2 files are whole" in out
    assert {path.name for path in (root / NAME).iterdir()} == {"checklist.chk", "params.json", "tokenizer.model"}


def test_a_refusal_is_one_line(fetch, loopback, root):
    loopback.fail("checklist.chk", status(403), look_ups=True)
    code, out, err = fetch(NAME)
    assert code == 1 and out == "" and err.count("\n") == 1 and "refused (403)" in err
    assert not (root / NAME).exists(), "nothing arrived"


def test_without_httpx_it_says_what_to_install(fetch, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "httpx" else real(name, *rest))
    code, _, err = fetch(NAME)
    assert code == 2 and "pip install httpx" in err


def test_progress_is_drawn_on_a_terminal(loopback, root, tmp_path):
    (tmp_path / "link.txt").write_text(loopback.link)
    loopback.fail(SHARD, stall(5000))
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(REPOSITORY)
        os.execv(sys.executable, command(tmp_path, loopback))
    shown = b""
    while b"in all" not in shown or SHARD.encode() not in shown:
        shown += os.read(terminal, 10_000)
    os.kill(child, signal.SIGINT)
    try:
        while data := os.read(terminal, 10_000):
            shown += data
    except OSError:
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    check_secret(shown.decode(), loopback.link)


# ---- interruptions and errors


def command(place: Path, loopback: Loopback) -> list[str]:
    file = place / "link.txt"
    file.write_text(loopback.link)
    words = [sys.executable, "-m", "llama_ref.cli", "download", NAME, "--file", str(file)]
    return [*words, "--allow_host", loopback.host]


def start(place: Path, loopback: Loopback) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(place, loopback), cwd=REPOSITORY, **pipes)


def check_files(place: Path, loopback: Loopback, tiny: Path) -> None:
    """Check that no file but the link's contains a secret, and that finished files are right."""
    for path in (each for each in place.rglob("*") if each.is_file() and each.name != "link.txt"):
        data = path.read_bytes()
        check_secret(data.decode("latin-1"), loopback.link)
        if (tiny / path.name).exists():
            assert data == (tiny / path.name).read_bytes(), path


def test_ctrl_c_keeps_what_has_arrived(loopback, root, tmp_path, tiny):
    loopback.fail(SHARD, stall(70_000))
    process = start(tmp_path, loopback)
    assert loopback.reached.wait(60)
    part, state = (root / NAME / f"{SHARD}{end}" for end in (".part", ".part.json"))
    while not part.exists() or part.stat().st_blocks * 512 < 60_000:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    assert sum(done for _, _, done in json.loads(state.read_text())["segments"]) > 0
    check_files(tmp_path, loopback, tiny)
    done = subprocess.run(command(tmp_path, loopback), cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert min(each.range[0] for each in loopback.weights_asked()[1:]) > 0, "it went on where it stopped"
    check_secret(out + err + done.stdout + done.stderr, loopback.link)


SLOW = f"""
import random, sys, time
from llama_ref.download import fetch, part, ranges
from llama_ref.cli import main
ranges.SMALLEST = ranges.LARGEST = 1 << 14
fetch.SAVE_SECONDS = fetch.TICK_SECONDS = 0.002
write = part.Part.write
def slowly(self, segment, data):
    for at in range(0, len(data), 1024):
        time.sleep(0.0005)
        write(self, segment, data[at : at + 1024])
part.Part.write = slowly
print("ready", flush=True)
sys.exit(main(["download", {NAME!r}, "--file", sys.argv[1], "--allow_host", sys.argv[2]]))
"""


@pytest.mark.attack
def test_killed_at_any_moment_no_file_is_wrong(loopback, root, tmp_path, tiny, warm):
    file = tmp_path / "link.txt"
    file.write_text(loopback.link)
    chance = random.Random(4)
    words = [warm / "python", "-c", SLOW, file, loopback.host]
    for _ in range(8):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY)
        process.stdout.readline()
        until = loopback.sent + chance.randrange(2000, 40_000)
        while loopback.sent < until and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        out, err = process.communicate()
        check_secret((out + err).decode(), loopback.link)
        check_files(tmp_path, loopback, tiny)
    sent = loopback.sent
    done = subprocess.run([*words], capture_output=True, text=True, cwd=REPOSITORY, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    check_files(tmp_path, loopback, tiny)
    assert {path.name for path in (root / NAME).iterdir()} == {path.name for path in tiny.iterdir()}
    assert loopback.sent - sent <= len(loopback.files[f"{REMOTE}/{SHARD}"]) + 10_000
