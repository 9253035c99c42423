"""Two nodes whose link goes down, and the time after which a silent process counts as lost."""

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from folders import tiny_folder
from jobs import ENVIRONMENT, TORCHRUN
from llama_ref.errors import RequestError
from llama_ref.parallel.heartbeat import VARIABLE, limit_seconds

WORKER = Path(__file__).parents[1] / "endless_worker.py"
ADDRESSES = ("10.213.17.1", "10.213.17.2")  # in namespaces of their own
PATIENCE_SECONDS = 60


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Two network namespaces, joined by one link: its ends are called as the namespaces are."""
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


def agent(n: int, name: str, folder: Path) -> subprocess.Popen:
    """One node's torchrun, in its namespace."""
    meeting = ["--nnodes", "2", "--node_rank", str(n), "--nproc_per_node", "1", "--master_addr", ADDRESSES[0]]
    words = ["ip", "netns", "exec", name, *TORCHRUN, *meeting, "--local_addr", ADDRESSES[n]]
    environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": f"node{n}", VARIABLE: "5"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen([*words, WORKER, folder, folder / "tokenizer.model"], **options)


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_a_link_that_goes_down_ends_both_nodes_with_one_message_each(nodes, tmp_path):
    folder = tiny_folder(tmp_path / "tiny")
    agents = [agent(n, name, folder) for n, name in enumerate(nodes)]
    started = []
    try:
        assert agents[0].stdout.readline() == "going\n", agents[0].communicate()[1]
        started = [each for process in agents for each in psutil.Process(process.pid).children(recursive=True)]
        ip("-n", nodes[0], "link", "set", "node0", "down")
        said = [process.communicate(timeout=PATIENCE_SECONDS)[1] for process in agents]
    finally:
        for process in [*agents, *started]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    for n, stderr in enumerate(said):
        assert agents[n].returncode != 0
        assert stderr.count("llama-ref: ") == 1, stderr
        assert f"llama-ref: nothing was heard of rank {1 - n} (" in stderr, stderr


FAILING = """
import threading, time
from torch.distributed import HashStore
from llama_ref.parallel.agreement import Agreement

store = HashStore()
first, second = (Agreement(store, rank, 2) for rank in range(2))
threading.Thread(target=second.check, args=("joining", {})).start()
first.check("joining", {})
second.heartbeat.leave(failed=True)
time.sleep(60)  # as in a long computation
"""


def test_a_process_that_failed_ends_the_others_while_they_compute():
    done = subprocess.run(
        [sys.executable, "-c", FAILING], capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert done.returncode == 1
    assert re.fullmatch(r"rank 1 \(.+\) ended with an error: this process cannot continue without; .+\n", done.stderr)


def test_the_time_may_be_set(monkeypatch):
    assert limit_seconds() == 30
    monkeypatch.setenv(VARIABLE, "2.5")
    assert limit_seconds() == 2.5


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_time_that_is_none_is_refused(monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(RequestError, match=f"{VARIABLE} is .*, expected a number of seconds, 1 or more"):
        limit_seconds()
