"""Heartbeats: a link between nodes goes down, and the limit for a silent process."""

import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
from torch.distributed import FileStore, HashStore

from folders import tiny_folder
from jobs import ENVIRONMENT
from llama_ref.errors import RequestError
from llama_ref.parallel import heartbeat, peers
from llama_ref.parallel.heartbeat import LEFT, VARIABLE, Heartbeat, end_at_once, limit_seconds
from warm import warm_commands

WORKER = Path(__file__).parents[1] / "endless_worker.py"
ADDRESSES = ("10.213.17.1", "10.213.17.2")  # in separate network namespaces
PATIENCE_SECONDS = 60


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Two network namespaces, joined by one link whose ends are named like the namespaces."""
    names = [f"llama-ref-{n}" for n in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "node0", "netns", names[0], "type", "veth", "peer", "name", "node1", "netns", names[1])
        for n, name in enumerate(names):
            ip("-n", name, "address", "add", f"{ADDRESSES[n]}/24", "dev", f"node{n}")
            for device in ("lo", f"node{n}"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def end(process: subprocess.Popen | psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


def agent(n: int, warm: Path, folder: Path) -> subprocess.Popen:
    """The torchrun process of one node, among the commands that run in its namespace."""
    meeting = ["--nnodes", "2", "--node_rank", str(n), "--nproc_per_node", "1", "--master_addr", ADDRESSES[0]]
    words = [warm / "torchrun", *meeting, "--local_addr", ADDRESSES[n]]
    environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": f"node{n}", VARIABLE: "5"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen([*words, WORKER, folder, folder / "tokenizer.model", folder.parent], **options)


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_a_link_that_goes_down_ends_both_nodes_with_one_message_each(nodes, tmp_path):
    folder = tiny_folder(tmp_path / "tiny")
    with ExitStack() as stack:
        agents = []
        for n, name in enumerate(nodes):
            (tmp_path / name).mkdir()
            warm = stack.enter_context(warm_commands(tmp_path / name, "ip", "netns", "exec", name))
            agents.append(agent(n, warm, folder))
            stack.callback(end, agents[-1])
        assert agents[0].stdout.readline() == "going\n", agents[0].communicate()[1]
        for rank in range(2):
            stack.callback(end, psutil.Process(int((tmp_path / str(rank)).read_text())))
        ip("-n", nodes[0], "link", "set", "node0", "down")
        said = [process.communicate(timeout=PATIENCE_SECONDS)[1] for process in agents]
    for n, stderr in enumerate(said):
        assert agents[n].returncode != 0
        assert stderr.count("llama-ref: ") == 1, stderr
        assert f"llama-ref: nothing was heard from rank {1 - n} (" in stderr, stderr


@pytest.fixture
def ended(monkeypatch) -> queue.SimpleQueue[str]:
    """Record the messages of `end_at_once` instead of ending the process."""
    messages: queue.SimpleQueue[str] = queue.SimpleQueue()
    monkeypatch.setattr(heartbeat, "end_at_once", messages.put)
    return messages


def test_a_process_that_failed_ends_the_others_while_they_compute(ended, monkeypatch):
    monkeypatch.setattr(heartbeat, "LONGEST_INTERVAL_SECONDS", 0.1)
    store = HashStore()
    first, second = (Heartbeat(store, rank, 2) for rank in range(2))
    first.all_have_joined({0: "a", 1: "b"})
    second.leave(failed=True)
    message = ended.get(timeout=PATIENCE_SECONDS)
    first.leave()
    assert message.startswith("rank 1 (b) ended with an error, so this process cannot continue; ")


def test_a_process_ends_where_no_thread_can_be_started(monkeypatch, caplog):
    """As in interpreter shutdown, when leaving the process group may wait for a lost process."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    end_at_once("nothing was heard")
    assert (codes, caplog.messages) == ([1], ["nothing was heard"])


class Unread(logging.Handler):
    """A stream that nobody reads: writing blocks until the test is over."""

    def __init__(self) -> None:
        super().__init__()
        self.is_over = threading.Event()
        self.blocked: list[threading.Thread] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.blocked.append(threading.current_thread())
        self.is_over.wait()


@pytest.fixture
def unread() -> Iterator[None]:
    handler = Unread()
    peers.logger.addHandler(handler)
    yield
    handler.is_over.set()
    peers.logger.removeHandler(handler)
    for thread in handler.blocked:
        thread.join()


def test_a_stream_that_nobody_reads_keeps_no_process_waiting(unread, ended, monkeypatch):
    monkeypatch.setattr(heartbeat, "limit_seconds", lambda: 0.2)
    monkeypatch.setattr(heartbeat, "LONGEST_SAYING_SECONDS", 0.05)
    beating = Heartbeat(HashStore(), 0, 2)
    beating.all_have_joined({0: "a", 1: "b"})
    message = ended.get(timeout=10)
    beating.leave()
    assert message.startswith("nothing was heard from rank 1 (b) for 0.2 s: ")


def test_of_the_ranks_that_run_the_first_says_whom_they_wait_for(ended, monkeypatch, caplog):
    monkeypatch.setattr(heartbeat, "limit_seconds", lambda: 0.2)
    store = HashStore()
    store.multi_set(["beat/0", "beat/2"], ["left", "1"])
    beating = Heartbeat(store, 1, 3)
    beating.all_have_joined({0: "a", 1: "b", 2: "c"})
    ended.get(timeout=PATIENCE_SECONDS)
    beating.leave()
    assert caplog.messages == ["waiting for rank 2 (c), silent for 0 s"]


def test_a_fork_that_ends_does_not_leave_the_job(tmp_path):
    store = FileStore(str(tmp_path / "store"), 1)
    beating = Heartbeat(store, 0, 1)
    if (child := os.fork()) == 0:
        beating.leave()
        os._exit(0)
    os.waitpid(child, 0)
    assert store.get("beat/0") != LEFT
    beating.leave()
    assert store.get("beat/0") == LEFT


def test_the_time_may_be_set(monkeypatch):
    assert limit_seconds() == 30
    monkeypatch.setenv(VARIABLE, "2.5")
    assert limit_seconds() == 2.5


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", ""])
def test_an_invalid_time_is_refused(monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(RequestError, match=f"{VARIABLE} is .*, expected a number of seconds, 1 or more"):
        limit_seconds()
