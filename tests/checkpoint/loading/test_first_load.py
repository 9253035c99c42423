"""Only checked files are loaded; each is hashed once, and a stamp is valid for that file only."""

import contextlib
import fcntl
import io
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import chat_completion
import text_completion
from folders import byte_tokenizer, tiny_folder
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.integrity import write_checklist
from llama_ref.checkpoint.loading import first_load as module
from llama_ref.checkpoint.loading.first_load import cache_directory, verified
from llama_ref.checkpoint.verify.hashing import hash_open_file
from llama_ref.cli import main
from llama_ref.cli.parsing.parser import run as run_script
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.generation import Llama

FILES = SHARD0, SHARD1, PARAMS, TOKENIZER = ["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"]
LIST = "checklist.chk"
PROMPTLY_SECONDS = 10


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("verified") / "whole", shards=2)


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "folder"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache directory for this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llama_ref" / "verified"


def check(folder: Path, verify: str = "auto", tokenizer: Path | None = None) -> None:
    """Check a folder as `Llama.build` does, without building a model."""
    with verified(open_folder(folder), verify, tokenizer or folder / TOKENIZER):
        pass


def build(folder: Path, verify: str = "auto", **options) -> Llama:
    return Llama.build(folder, device="cpu", dtype="float32", verify=verify, **options)


def newly(hashed: list[str]) -> list[str]:
    """The files that were hashed since the last call, sorted."""
    names = sorted(hashed)
    hashed.clear()
    return names


def flip(path: Path) -> None:
    """Flip one bit of a weight in place, and restore mtime."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(9000)
        byte = file.read(1)[0]
        file.seek(9000)
        file.write(bytes([byte ^ 0x10]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)


def renew(path: Path) -> None:
    """Replace the file by a copy with the same size and mtime."""
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    copy.replace(path)


def list_wrongly(folder: Path, name: str) -> None:
    """Write a wrong checksum for a file into the list; the file itself still loads."""
    lines = (folder / LIST).read_text().splitlines(keepends=True)
    (folder / LIST).write_text("".join("0" * 32 + line[32:] if line.endswith(f"{name}\n") else line for line in lines))


# ---- once


def test_each_file_is_hashed_once(folder, hashed):
    build(folder)
    assert newly(hashed) == FILES
    build(folder)
    assert newly(hashed) == []
    build(folder, "never")
    assert newly(hashed) == []
    build(folder, "always")
    assert newly(hashed) == FILES
    build(folder)
    assert newly(hashed) == []


def test_a_tokenizer_from_elsewhere_is_not_the_lists_business(folder, hashed, tmp_path):
    build(folder, tokenizer_path=byte_tokenizer(tmp_path / "own.model"))
    assert newly(hashed) == FILES[:3]


def test_a_folder_is_known_by_whatever_path(folder, hashed, monkeypatch, tmp_path):
    check(folder)
    newly(hashed)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for path in (Path(), tmp_path / "link", tmp_path / "cache" / ".." / "folder"):
        check(path)
    assert newly(hashed) == []


def test_a_folder_that_moved_is_hashed_again(folder, hashed):
    check(folder)
    newly(hashed)
    check(folder.rename(folder.with_name("moved")))
    assert newly(hashed) == FILES


CHANGES = {
    "touched": lambda path: os.utime(path),
    "renewed": renew,
    "rewritten": lambda path: path.write_bytes(path.read_bytes()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_changed_is_hashed_again(folder, hashed, name, change):
    check(folder)
    newly(hashed)
    CHANGES[change](folder / name)
    check(folder)
    assert newly(hashed) == [name]


DAMAGES = {
    "in place": flip,
    "by replacement": lambda path: (renew(path), flip(path)),
    "by another shard": lambda path: shutil.copy2(path.with_name(SHARD0), path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_a_stamped_file_is_noticed_though_size_and_time_stay(folder, damage):
    build(folder)
    DAMAGES[damage](folder / SHARD1)
    for _ in range(2):  # the second try fails too
        with pytest.raises(CheckpointError, match=rf"{SHARD1} does not match checklist.chk: md5 \w{{32}}, expected \w{{32}}"):
            build(folder)
    assert build(folder, "never")


@pytest.mark.parametrize("verify", ["auto", "always"])
@pytest.mark.parametrize("name", FILES)
def test_each_file_that_is_used_must_be_as_listed(folder, name, verify):
    list_wrongly(folder, name)
    with pytest.raises(CheckpointError, match=f"{name} does not match checklist.chk"):
        build(folder, verify)


def test_a_sum_holds_only_for_the_list_that_says_it(folder, hashed):
    check(folder)
    write_checklist(folder, "sha256", force=True)
    newly(hashed)
    check(folder)
    assert newly(hashed) == FILES
    write_checklist(folder, "md5", force=True)
    check(folder)
    assert newly(hashed) == []
    list_wrongly(folder, SHARD0)
    with pytest.raises(CheckpointError, match=SHARD0):
        check(folder)


# ---- links and odd files


def test_a_stamp_vouches_for_no_other_file_behind_the_same_link(folder, tmp_path, hashed):
    good, bad = tmp_path / "good.pth", tmp_path / "bad.pth"
    shutil.copy2(folder / SHARD0, bad)
    flip(bad)
    (folder / SHARD0).rename(good)
    (folder / SHARD0).symlink_to(good)
    check(folder)
    (folder / SHARD0).unlink()
    (folder / SHARD0).symlink_to(bad)
    with pytest.raises(CheckpointError, match=SHARD0):
        check(folder)
    (folder / SHARD0).unlink()
    (folder / SHARD0).symlink_to(good)
    newly(hashed)
    check(folder)
    assert newly(hashed) == []


def test_folders_that_share_a_file_by_hard_link_are_judged_each_by_its_own_list(folder, original, tmp_path):
    other = Path(shutil.copytree(original, tmp_path / "other"))
    (other / SHARD0).unlink()
    (other / SHARD0).hardlink_to(folder / SHARD0)
    check(folder)
    list_wrongly(other, SHARD0)
    with pytest.raises(CheckpointError, match=f"other/{SHARD0}"):
        check(other)
    check(folder)
    flip(other / SHARD0)
    with pytest.raises(CheckpointError, match=f"folder/{SHARD0}"):
        check(folder)


ODD_FILES = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to("gone"),
}


@pytest.mark.parametrize("odd", ODD_FILES)
@pytest.mark.parametrize("name", [SHARD0, PARAMS, TOKENIZER])
def test_what_is_no_file_is_refused_at_once(folder, name, odd):
    (folder / name).unlink()
    ODD_FILES[odd](folder / name)
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=name):
        build(folder)
    assert time.monotonic() - begun < PROMPTLY_SECONDS


def test_nothing_is_loaded_by_the_word_of_unchecked_params(folder):
    list_wrongly(folder, PARAMS)
    entered = False
    with pytest.raises(CheckpointError, match=PARAMS), verified(open_folder(folder)):
        entered = True
    assert not entered


@pytest.mark.parametrize("stamped", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_changes_while_it_is_loaded_is_refused(folder, name, stamped):
    if stamped:
        check(folder)
    with (
        pytest.raises(CheckpointError, match=f"{name} changed while"),
        verified(open_folder(folder), "auto", folder / TOKENIZER),
    ):
        renew(folder / name)


# ---- without a list, or with a bad one


def test_without_a_list_one_line_says_so(folder, caplog, hashed):
    (folder / LIST).unlink()
    with caplog.at_level(logging.INFO):
        assert build(folder)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder} has no checklist.chk, so its files cannot be verified"
    ]
    with pytest.raises(CheckpointError, match=r"has no checklist\.chk.*llama-ref checksum"):
        build(folder, "always")
    caplog.clear()
    assert build(folder, "never")
    assert not caplog.records and not hashed


@pytest.mark.parametrize("name", [SHARD1, PARAMS, TOKENIZER])
def test_a_file_that_the_list_does_not_name_is_not_loaded(folder, name):
    lines = (folder / LIST).read_text().splitlines(keepends=True)
    (folder / LIST).write_text("".join(line for line in lines if name not in line))
    with pytest.raises(CheckpointError, match=f"does not name {name}, so they cannot be checked"):
        build(folder)
    assert build(folder, "never")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"<!DOCTYPE html><html>", "an HTML page"), (b"", "an empty file"), (b"0123  short\n", "has no line of the form")],
    ids=["web page", "empty", "no line"],
)
@pytest.mark.parametrize("verify", ["auto", "always"])
def test_a_list_that_is_none_vouches_for_nothing(folder, verify, content, words):
    (folder / LIST).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"checklist.chk.*{words}"):
        build(folder, verify)
    assert build(folder, "never")


@pytest.mark.parametrize("verify", ["Auto", "", True, None, ["auto"]])
def test_another_word_than_the_three_is_refused(folder, verify):
    with pytest.raises(RequestError, match="expected auto, always or never"):
        build(folder, verify)


# ---- while loading


def test_hashing_and_loading_overlap_and_no_model_comes_before_both_are_done(folder, monkeypatch):
    hashing, loaded, may_end, built = (threading.Event() for _ in range(4))

    def slow(file, *args, **options):
        if str(file.name).endswith(".pth"):
            hashing.set()
            assert loaded.wait(PROMPTLY_SECONDS) and may_end.wait(PROMPTLY_SECONDS)
        return hash_open_file(file, *args, **options)

    def progress(done, total):
        assert hashing.wait(PROMPTLY_SECONDS)
        if done == total:
            loaded.set()

    monkeypatch.setattr(module, "hash_open_file", slow)
    thread = threading.Thread(target=lambda: (build(folder, progress=progress), built.set()))
    thread.start()
    assert loaded.wait(PROMPTLY_SECONDS)
    assert not built.wait(0.2)
    may_end.set()
    assert built.wait(PROMPTLY_SECONDS)
    thread.join()


def test_a_load_that_fails_does_not_wait_for_sums(folder):
    with (folder / SHARD0).open("r+b") as file:
        file.truncate(1 << 40)  # half an hour of hashing
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=SHARD0):
        build(folder)
    assert time.monotonic() - begun < PROMPTLY_SECONDS


def test_one_bad_file_ends_the_hashing_of_the_others(folder, monkeypatch):
    monkeypatch.setattr(module, "cpu_count", lambda: 4)
    with (folder / SHARD0).open("r+b") as file:
        file.truncate(1 << 40)
    flip(folder / SHARD1)
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=f"{SHARD1} does not match checklist.chk"):
        check(folder)
    assert time.monotonic() - begun < PROMPTLY_SECONDS


# ---- places for stamps


def content(folder: Path) -> dict[str, tuple]:
    """All paths in a folder, with mtime and content."""
    paths = [folder, *folder.rglob("*")]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in paths}


PLACES = {
    "elsewhere": lambda folder: {"XDG_CACHE_HOME": str(folder.parent / "cache")},
    "in the folder": lambda folder: {"XDG_CACHE_HOME": str(folder)},
    "in the folder by a link": lambda folder: {"XDG_CACHE_HOME": str(folder.parent / "link" / "deep")},
    "relative": lambda folder: {"XDG_CACHE_HOME": "cache", "HOME": str(folder.parent)},
    "home": lambda folder: {"XDG_CACHE_HOME": "", "HOME": str(folder)},
}


@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_written_into_the_folder(folder, hashed, monkeypatch, place):
    (folder.parent / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for key, value in PLACES[place](folder).items():
        monkeypatch.setenv(key, value)
    before = content(folder)
    check(folder)
    assert content(folder) == before
    newly(hashed)
    check(folder)
    assert newly(hashed) == ([] if place in ("elsewhere", "relative") else FILES)


def test_a_user_without_a_home_can_load(folder, hashed, monkeypatch):
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", unknown)  # as for an unnamed user in a container
    for _ in range(2):
        check(folder)
        assert newly(hashed) == FILES
    list_wrongly(folder, SHARD0)
    with pytest.raises(CheckpointError, match=SHARD0):
        check(folder)


def test_a_cache_that_cannot_be_written_only_costs_time(unprivileged_folder, hashed, monkeypatch):
    folder = tiny_folder(unprivileged_folder / "folder", shards=2)
    locked = unprivileged_folder / "locked"
    locked.mkdir(mode=0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(locked))
    for _ in range(2):
        check(folder)
        assert newly(hashed) == FILES
    flip(folder / SHARD1)
    with pytest.raises(CheckpointError, match=SHARD1):
        check(folder)
    assert not any(locked.iterdir())


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


def edited(**changes) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


BROKEN_STAMPS = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: os.truncate(path, 40),
    "no JSON": lambda path: path.write_bytes(b"\xff\0{"),
    "nested": lambda path: path.write_bytes(b"[" * 60_000),
    "null": lambda path: path.write_bytes(b"null"),
    "a list": lambda path: path.write_bytes(b"[1]"),
    "keys missing": lambda path: path.write_bytes(b'{"found": "x"}'),
    "time of no number": edited(hashed_ns=None),
    "endless time": edited(hashed_ns=float("inf")),
    "endless": lambda path: os.truncate(path, 1 << 40),
    "of another file": edited(file={}),
    "a folder": instead(Path.mkdir),
    "a pipe": instead(os.mkfifo),
    "a link to itself": instead(lambda path: path.symlink_to(path)),
    "for others to write": lambda path: path.chmod(0o666),
}


@pytest.mark.parametrize("broken", BROKEN_STAMPS)
def test_a_broken_stamp_vouches_for_nothing_and_breaks_nothing(folder, cache, hashed, broken):
    check(folder)
    newly(hashed)
    stamps = sorted(cache.glob("*.json"))
    assert len(stamps) == len(FILES)
    for path in stamps:
        BROKEN_STAMPS[broken](path)
    check(folder)
    assert newly(hashed) == FILES
    if broken != "a folder":  # a file cannot replace a folder
        check(folder)
        assert newly(hashed) == []
    list_wrongly(folder, SHARD0)
    with pytest.raises(CheckpointError, match=SHARD0):
        check(folder)
    assert not [path for path in cache.iterdir() if path.suffix not in (".json", ".lock")]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_stamp_is_not_believed(folder, cache, hashed):
    check(folder)
    newly(hashed)
    for path in cache.glob("*.json"):
        os.chown(path, 65534, 65534)
    check(folder)
    assert newly(hashed) == FILES


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_wrong_sum_is_never_remembered_as_good_nor_a_good_one_as_just_found(folder, cache, hashed, hours):
    """`always` hashes whatever time a stamp claims; a stamp with a wrong checksum is not used."""
    check(folder)
    for path in cache.glob("*.json"):
        edited(hashed_ns=time.time_ns() + hours * 3600 * 10**9)(path)
    newly(hashed)
    check(folder, "always")
    assert newly(hashed) == FILES
    for path in cache.glob("*.json"):
        edited(found="0" * 32, hashed_ns=time.time_ns() + hours * 3600 * 10**9)(path)
    check(folder)
    assert newly(hashed) == FILES


BROKEN_CACHES = {
    "a file": lambda root: root.write_text("x"),
    "a link to nothing": lambda root: root.symlink_to("gone/away"),
    "a link to itself": lambda root: root.symlink_to(root),
    "a device": lambda root: root.symlink_to("/dev/null"),
}


@pytest.mark.parametrize("broken", BROKEN_CACHES)
@pytest.mark.parametrize("level", ["cache", "cache/llama_ref", "cache/llama_ref/verified"])
def test_a_cache_directory_that_is_none_breaks_nothing(folder, tmp_path, hashed, level, broken):
    root = tmp_path / level
    root.parent.mkdir(parents=True, exist_ok=True)
    BROKEN_CACHES[broken](root)
    for _ in range(2):
        check(folder)
        assert newly(hashed) == FILES
    flip(folder / SHARD0)
    with pytest.raises(CheckpointError, match=SHARD0):
        check(folder)


@pytest.mark.parametrize("odd", ["a pipe", "a folder", "a link to itself"])
def test_an_odd_lock_breaks_nothing(folder, cache, hashed, odd):
    check(folder)
    newly(hashed)
    for path in [*cache.glob("*.lock"), *cache.glob("*.json")]:
        path.unlink()
        if path.suffix == ".lock":
            ODD_FILES[odd](path)
    for expected in (FILES, []):
        check(folder)
        assert newly(hashed) == expected


@pytest.mark.parametrize("plant", [Path.symlink_to, Path.hardlink_to])
def test_a_planted_link_lets_no_other_file_be_overwritten(folder, cache, tmp_path, plant):
    check(folder)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for path in list(cache.iterdir()):
        path.unlink()
        plant(path, precious)
    check(folder)
    assert precious.read_text() == "precious"


def test_stamps_are_for_this_user_alone(folder, cache):
    previous = os.umask(0)
    try:
        check(folder)
    finally:
        os.umask(previous)
    assert all(path.stat().st_mode & 0o077 == 0 for path in [cache, *cache.iterdir()])
    assert cache == cache_directory() / "verified"


# ---- several processes


def checking_process(folder: Path, cache: Path, verify: str, log: Path, n_processes: int) -> None:
    """Check `folder` in one of several processes; exit with 3 for a bad folder.

    No file is hashed before all processes have started.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["XDG_CACHE_HOME"] = str(cache)
    read_checklist = module.read_checklist

    def note(word: str) -> None:
        with log.open("a") as file:
            file.write(f"{word}\n")

    def noted_read(path):
        note("begun")
        return read_checklist(path)

    def noted_hash(file, *args, **options):
        while log.read_text().count("begun") < n_processes:
            time.sleep(0.01)
        note(Path(file.name).name)
        return hash_open_file(file, *args, **options)

    module.read_checklist, module.hash_open_file = noted_read, noted_hash
    try:
        check(folder, verify)
    except CheckpointError:
        sys.exit(3)
    except KeyboardInterrupt:
        os._exit(130)


@pytest.fixture
def processes(tmp_path, folder):
    """Start processes that check the folder at the same time and share a log; end them later."""
    # torch's threads do not survive a fork, but are not needed.
    context = multiprocessing.get_context("fork")
    log, started = tmp_path / "log", []
    log.touch()

    def start(n: int, verify: str = "auto") -> list[multiprocessing.Process]:
        arguments = (folder, tmp_path / "cache", verify, log, n)
        started.extend(context.Process(target=checking_process, args=arguments) for _ in range(n))
        for process in started:
            process.start()
        return started

    yield start, log
    for process in started:
        process.kill()
        process.join()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("verify", ["auto", "always"])
def test_processes_that_start_together_hash_each_file_once(processes, verify):
    start, log = processes
    running = start(4, verify)
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0] * 4
    assert sorted(log.read_text().split()) == ["begun"] * 4 + FILES


def test_processes_that_start_together_fail_together(processes, folder):
    flip(folder / SHARD0)
    start, log = processes
    running = start(4)
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [3] * 4
    assert log.read_text().split().count(SHARD0) == 1


@pytest.mark.parametrize("waiting", [False, True], ids=["hashing", "waiting for another process"])
def test_ctrl_c_ends_it_promptly(processes, folder, cache, waiting):
    with (folder / SHARD0).open("r+b") as file:
        file.truncate(1 << 40)
    with contextlib.ExitStack() as stack:
        if waiting:
            file = stack.enter_context(contextlib.closing(module._File(folder / SHARD0, entry_of(folder, SHARD0))))
            cache.mkdir(parents=True)
            lock = stack.enter_context(file._lock_path().open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        start, log = processes
        (process,) = start(1)
        wait_for(lambda: (TOKENIZER if waiting else SHARD0) in log.read_text())
        time.sleep(0.1)
        assert process.is_alive()
        os.kill(process.pid, signal.SIGINT)
        process.join(PROMPTLY_SECONDS)
        assert process.exitcode == 130


def entry_of(folder: Path, name: str) -> module.Entry:
    return next(entry for entry in module.read_checklist(folder / LIST).entries if entry.name == name)


# ---- every command that loads

COMMANDS = {
    "complete": (main, ["complete", "{}", "hi", "--max_gen_len", "1"]),
    "chat": (main, ["chat", "{}"]),
    "text_completion.py": (
        partial(run_script, text_completion.main),
        ["--ckpt_dir", "{}", "--max_gen_len", "1"],
    ),
    "chat_completion.py": (
        partial(run_script, chat_completion.main),
        ["--ckpt_dir", "{}", "--max_gen_len", "1"],
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_loads_takes_verify(folder, name, monkeypatch, capsys):
    started, words = COMMANDS[name]
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    list_wrongly(folder, SHARD1)

    def run(*verify: str) -> tuple[int, str]:
        code = started([*(word.format(folder) for word in words), "--device", "cpu", *verify])
        return code, capsys.readouterr().err

    for verify in ((), ("--verify", "auto"), ("--verify=always",)):
        code, err = run(*verify)
        assert code == 1 and err.startswith("llama-ref: ") and err.count("\n") == 1
        assert f"{SHARD1} does not match checklist.chk" in err
    assert run("--verify", "never")[0] == 0
    code, err = run("--verify", "sometimes")
    assert code == 2 and "expected auto, always or never" in err
