"""Jobs of several processes: starting on several nodes, and ending when something goes wrong."""

import copy
import io
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from folders import tiny_folder
from jobs import ENVIRONMENT, TORCHRUN, torchrun
from llama_ref.cli import main
from llama_ref.errors import JobError, RequestError
from llama_ref.parallel.heartbeat import VARIABLE
from llama_ref.parallel.job import Job, _stdout_kept, join_job

SCRIPTS = Path(__file__).parents[2] / "scripts"
WORKER = Path(__file__).parents[1] / "endless_worker.py"
PATIENCE_SECONDS = 60  # enough on a busy machine; a hang would last half an hour


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("job") / "tiny", shards=2)


@dataclass(frozen=True)
class Endless:
    """A two-process job that has started to generate and would run for hours; `workers` by rank."""

    torchrun: subprocess.Popen
    workers: list[psutil.Process]


@pytest.fixture
def start(folder, tmp_path) -> Iterator[Callable[..., Endless]]:
    """Start an endless job with a new torchrun, as users do, or with the warm one."""
    with ExitStack() as stack:

        def start(command: Sequence[str | Path], **variables: str) -> Endless:
            words = [*command, "--standalone", "--nproc_per_node", "2", WORKER, folder, folder / "tokenizer.model", tmp_path]
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT | variables}
            job = stack.enter_context(subprocess.Popen(words, start_new_session=True, **options))
            stack.callback(job.kill)
            assert job.stdout.readline() == "going\n", job.communicate()[1]
            workers = [psutil.Process(int((tmp_path / str(rank)).read_text())) for rank in range(2)]
            for worker in workers:
                stack.callback(end, worker)
            return Endless(job, workers)

        yield start


def end(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


def end_of(job: Endless) -> str:
    """The stderr of a job that must end now; checks that all its processes are gone."""
    _, stderr = job.torchrun.communicate(timeout=PATIENCE_SECONDS)
    _, alive = psutil.wait_procs(job.workers, timeout=PATIENCE_SECONDS)
    assert not alive
    assert job.torchrun.returncode != 0
    return stderr


@pytest.mark.parametrize("rank", [0, 1], ids=["the first", "another"])
def test_a_killed_process_ends_the_job_with_one_message(start, warm, rank):
    job = start([warm / "torchrun"])
    job.workers[rank].kill()
    stderr = end_of(job)
    # Torchrun reports which process was killed, and may end the others before they notice.
    assert "Signal 9 (SIGKILL) received" in stderr
    said = [line for line in stderr.splitlines() if line.startswith("llama-ref: ")]
    assert said in ([], ["llama-ref: another process of this job has ended, so this one cannot continue"])
    assert "[rank" not in stderr, "a worker's own traceback"


def test_a_stopped_process_ends_the_job_with_one_message(start, warm):
    job = start([warm / "torchrun"], **{VARIABLE: "5"})
    first, stopped = job.workers
    stopped.suspend()
    psutil.wait_procs([first], timeout=PATIENCE_SECONDS)
    stopped.resume()  # let it die: torchrun would wait 30 s before it kills a process that does not end
    stderr = end_of(job)
    assert stderr.count("waiting for rank 1 (") == 1
    assert stderr.count("llama-ref: ") == 1
    assert re.search(r"llama-ref: nothing was heard from rank 1 \(.+\) for 5 s: stopped, or the link is down", stderr)


def test_ctrl_c_ends_the_job_without_a_word_of_ours(start):
    """Needs a new torchrun: the warm one's processes have no terminal."""
    job = start(TORCHRUN)
    os.killpg(job.torchrun.pid, signal.SIGINT)  # like a terminal: to all processes at once
    stderr = end_of(job)
    assert "llama-ref: " not in stderr
    assert "[rank" not in stderr


@pytest.mark.parametrize("fault", ["a damaged shard", "a full disk behind stdout"])
def test_a_fault_that_one_process_alone_meets_ends_the_job_with_one_message(warm, folder, tmp_path, fault):
    options = {"timeout": PATIENCE_SECONDS, "warm": warm}
    if fault == "a damaged shard":  # rank 0 does not open it, and would wait for the other's part of an all-reduce
        folder = shutil.copytree(folder, tmp_path / "damaged")
        os.truncate(folder / "consolidated.01.pth", 5000)
        says = f"{folder}/consolidated.01.pth cannot be used"
    else:
        options["stdout"] = os.open("/dev/full", os.O_WRONLY)
        says = "No space left on device"
    words = ["--ckpt_dir", folder, "--max_gen_len", "4", "--verify", "never"]
    done = torchrun(2, SCRIPTS / "text_completion.py", *words, **options)
    assert done.returncode != 0
    assert done.stderr.count("llama-ref: ") == 1
    assert says in done.stderr
    assert "[rank" not in done.stderr, "a worker's own traceback"


def test_a_conversation_of_several_processes_is_that_of_one(warm, folder, tmp_path, monkeypatch, capsys):
    """The first process reads standard input and files; layers and matrices are distributed."""
    turns = f"hi\n/save {tmp_path}/talk.json\n/reset\n/load {tmp_path}/talk.json\n/load nowhere\nand\\\nso\n"
    words = ["chat", str(folder), "--max_gen_len", "4", "--temperature", "0", "--dtype", "float32", "--device", "cpu"]
    monkeypatch.setattr("sys.stdin", io.StringIO(turns))
    assert main(words) == 0
    alone = capsys.readouterr()
    words += ["--pipeline_parallel_size", "2"]
    done = torchrun(4, "-m", "llama_ref.cli", *words, input=turns, timeout=PATIENCE_SECONDS, warm=warm)
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.out
    of_others = re.compile(r"\[|.*(connected to|peer ranks)")  # the second: from PyTorch 2.8's Gloo
    told = [[line for line in err.splitlines() if not of_others.match(line)] for err in (alone.err, done.stderr)]
    assert told[1] == told[0]
    assert len(told[0]) == 4, "saved, conversation reset, loaded, cannot read"


def test_a_lost_process_is_a_job_error_in_python(peaked, monkeypatch):
    """If another process ends, a script can catch a JobError with a correct message."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    llama = copy.copy(peaked)
    llama.job = Job(tensor_group=object())

    def fails(message: str) -> None:
        def broadcast(*_: object, **__: object) -> None:
            raise RuntimeError(message)

        monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
        llama.generate([[1, 2]], 4, temperature=0)

    with pytest.raises(JobError, match="another process of this job has ended"):
        fails("Connection closed by peer [127.0.0.1]:4528")
    with pytest.raises(RuntimeError, match="a bug"):
        fails("a bug")


def test_processes_cannot_work_together_on_mps(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # whatever other tests have initialized
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RequestError, match="2 processes cannot work together on mps: use --device cpu"):
        join_job(None, 1, torch.device("mps"))


@pytest.mark.parametrize("stages", [1, 2])
def test_a_job_may_run_on_several_nodes(warm, folder, stages):
    """Two torchrun agents, as on two machines, which meet through torchrun's rendezvous."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}"]
    words = [SCRIPTS / "text_completion.py", "--ckpt_dir", folder, "--max_gen_len", "4", "--temperature", "0"]
    words += ["--pipeline_parallel_size", str(stages)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    nodes = [subprocess.Popen([warm / "torchrun", *meeting, *words], **options) for _ in range(2)]
    said = [node.communicate(timeout=2 * PATIENCE_SECONDS) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sorted(stdout.count("I believe the meaning of life is") for stdout, _ in said) == [0, 1]


def test_what_gloo_writes_to_stdout_goes_to_stderr(capfd):
    """PyTorch 2.8's Gloo logs connections to stdout, in the middle of a command's JSON."""
    print("before", flush=True)
    with _stdout_kept():
        os.write(1, b"[Gloo] connected\n")
    print("after", flush=True)
    assert capfd.readouterr() == ("before\nafter\n", "[Gloo] connected\n")
