"""How a job of several processes begins on several nodes, and how it ends when something goes wrong."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from folders import tiny_folder
from jobs import ENVIRONMENT, TORCHRUN

SCRIPTS = Path(__file__).parents[1] / "scripts"
WORKER = Path(__file__).with_name("endless_worker.py")
PATIENCE_SECONDS = 60  # on a busy machine; what hangs, hangs for half an hour


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("job") / "tiny", shards=2)


@pytest.fixture
def endless(folder) -> Iterator[subprocess.Popen]:
    """A job of two processes that has begun to generate and would go on for hours."""
    words = ["--standalone", "--nproc_per_node", "2", WORKER, folder, folder / "tokenizer.model"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    with subprocess.Popen([*TORCHRUN, *words], start_new_session=True, **options) as job:
        try:
            assert job.stdout.readline() == "going\n", job.communicate()[1]
            yield job
        finally:
            for process in processes_of(job):
                process.kill()


def processes_of(job: subprocess.Popen) -> list[psutil.Process]:
    """Torchrun itself first, then those that it has started."""
    try:
        return [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def worker(job: subprocess.Popen, rank: int) -> psutil.Process:
    return next(process for process in processes_of(job)[1:] if process.environ().get("RANK") == str(rank))


def end_of(job: subprocess.Popen, processes: list[psutil.Process]) -> str:
    """What a job that must end now says on stderr; all its processes are gone then."""
    _, stderr = job.communicate(timeout=PATIENCE_SECONDS)
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE_SECONDS)
    assert not alive
    return stderr


@pytest.mark.parametrize("rank", [0, 1], ids=["the first", "another"])
def test_a_killed_process_ends_the_job_with_one_message(endless, rank):
    processes = processes_of(endless)
    worker(endless, rank).kill()
    stderr = end_of(endless, processes)
    assert endless.returncode != 0
    assert stderr.count("llama-ref: ") == 1
    assert "another process of this job has ended, so this one cannot go on" in stderr
    assert "[rank" not in stderr, "a worker's own traceback"


def test_ctrl_c_ends_the_job_without_a_word_of_ours(endless):
    processes = processes_of(endless)
    os.killpg(endless.pid, signal.SIGINT)  # as a terminal does it: to all of them at once
    stderr = end_of(endless, processes)
    assert endless.returncode != 0
    assert "llama-ref: " not in stderr
    assert "[rank" not in stderr


def test_a_job_may_run_on_several_nodes(folder):
    """Two agents, as each of two machines would start one; they find each other as torchrun does it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}"]
    words = [SCRIPTS / "text_completion.py", "--ckpt_dir", folder, "--max_gen_len", "4", "--temperature", "0"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    nodes = [subprocess.Popen([*TORCHRUN, *meeting, *words], **options) for _ in range(2)]
    said = [node.communicate(timeout=2 * PATIENCE_SECONDS) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sorted(stdout.count("I believe the meaning of life is") for stdout, _ in said) == [0, 1]
