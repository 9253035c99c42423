"""A process waits for another one's hash only while that one makes progress."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from folders import tiny_folder
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.loading import hash_lock as module
from llama_ref.checkpoint.loading.first_load import verified
from llama_ref.checkpoint.loading.hash_lock import hash_lock

FILES = SHARD, PARAMS = ["consolidated.00.pth", "params.json"]
PROMPTLY_SECONDS = 10

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="names and states of processes are read from /proc"
)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tiny_folder(tmp_path / "folder")


@pytest.fixture
def short_times(monkeypatch) -> None:
    for name, seconds in {"SILENT_SECONDS": 0.1, "STALLED_SECONDS": 0.6, "BEAT_SECONDS": 0.05}.items():
        monkeypatch.setattr(module, name, seconds)


@pytest.fixture
def process() -> Iterator[Callable[..., int]]:
    """Start a process that runs a function, and return its id. It is killed at the end."""
    context, started = multiprocessing.get_context("fork"), []

    def start(action: Callable[..., None], *args: object) -> int:
        started.append(context.Process(target=action, args=args))
        started[-1].start()
        return started[-1].pid

    yield start
    for each in started:
        each.kill()
        each.join()


def check(folder: Path) -> None:
    with verified(open_folder(folder)):
        pass


def stop_with_lock(lock: Path, path: Path) -> None:
    with hash_lock(lock, path, threading.Event()):
        os.kill(os.getpid(), signal.SIGSTOP)


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PROMPTLY_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def held(cache: Path, pid: int) -> list[Path]:
    """The locks that a process holds on files without a known checksum."""
    locks = [lock for lock in cache.rglob("*.lock") if lock.read_text().startswith(f"{pid} ")]
    return [lock for lock in locks if not lock.with_suffix(".json").exists()]


def test_a_stopped_process_is_named_and_then_no_longer_waited_for(folder, tmp_path, hashed, process, short_times, caplog):
    check(folder)
    [*locks] = tmp_path.rglob("*.lock")
    assert len(locks) == len(FILES)
    for stamp in tmp_path.rglob("verified/*.json"):
        stamp.unlink()
    hashed.clear()
    stopped = [process(stop_with_lock, lock, folder) for lock in locks]
    for pid in stopped:
        wait_for(lambda pid=pid: Path(f"/proc/{pid}/stat").read_text().split()[2] == "T")
    check(folder)
    assert sorted(hashed) == FILES
    name = Path("/proc/self/comm").read_text().strip()
    for pid in stopped:
        said = [record.getMessage() for record in caplog.records if f"process {pid} ({name})" in record.getMessage()]
        waiting, stalled = said
        assert waiting.startswith("waiting for") and str(folder) in waiting and "which is hashing" in waiting
        assert "has made no progress" in stalled and "Hashing the file again" in stalled
    hashed.clear()
    check(folder)  # does not wait once the checksums are known
    assert hashed == []


def test_a_process_that_hashes_is_waited_for_however_long(folder, tmp_path, process, short_times, caplog):
    with (folder / SHARD).open("r+b") as file:
        file.truncate(1 << 40)  # half an hour of hashing
    cache = tmp_path / "cache"
    pid = process(check, folder)
    wait_for(lambda: len(list(cache.rglob("*.json"))) == 1 and held(cache, pid))
    [lock] = held(cache, pid)
    entered, cancel = threading.Event(), threading.Event()

    def wait() -> None:
        with hash_lock(lock, folder / SHARD, cancel):
            entered.set()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        assert not entered.wait(1.5 * module.STALLED_SECONDS)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert f"waiting for process {pid} (" in caplog.text and SHARD in caplog.text
        os.kill(pid, signal.SIGSTOP)
        assert entered.wait(PROMPTLY_SECONDS)
        assert "has made no progress" in caplog.text
    finally:
        cancel.set()
        thread.join()
