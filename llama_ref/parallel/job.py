"""Run a model on several processes: how they connect, what each holds, how they exit."""

import atexit
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store
from torch.distributed.rendezvous import rendezvous

from llama_ref.errors import JobError, RequestError
from llama_ref.parallel.agreement import FIRST_WARNING_SECONDS, JOIN_SECONDS, Agreement
from llama_ref.parallel.heartbeat import store_address
from llama_ref.parallel.sharding import WHOLE, Share

REPORTED = (1, 2)  # exit codes of a process that has reported its error
TIMEOUT = timedelta(days=30)  # rank 0 may wait for a person; the default collective timeout is 30 minutes
STORE_TIMEOUT = timedelta(minutes=30)  # torch's default

LOST = "another process of this job has ended, so this one cannot continue"

T = TypeVar("T")

logger = logging.getLogger(__name__)

_agreement: Agreement | None = None  # of this process, once it has joined a job


@dataclass(frozen=True)
class Job:
    """A process's share of the model, and its process groups: None for a single process.

    The processes of the `tensor_group` hold the other parts of this stage's matrices, those of the
    `pipeline_group` the same part of the other stages. Consecutive ranks, which torchrun starts on
    one node, form a tensor group, because it communicates more. Before each step, all processes
    compare what they are about to do through the `agreement`.
    """

    share: Share = WHOLE
    tensor_group: ProcessGroup | None = None
    pipeline_group: ProcessGroup | None = None
    agreement: Agreement | None = None

    @property
    def is_parallel(self) -> bool:
        return self.tensor_group is not None or self.pipeline_group is not None

    def check_same(self, step: str, facts: Mapping[str, object]) -> None:
        """Wait for all processes before a step. Raises JobError if their facts about it differ."""
        if self.agreement:
            self.agreement.check(step, facts)


ALONE = Job()


def join_job(model_parallel_size: int | None, pipeline_parallel_size: int, device: torch.device) -> Job:
    """Join the job in torchrun's environment, with `pipeline_parallel_size` stages.

    Initialises torch.distributed (NCCL on CUDA, else Gloo) unless the script already has. Raises
    RequestError if the number of stages does not divide the number of processes, if
    `model_parallel_size` (an argument of Meta's scripts) is not the number of processes per stage,
    or for a device without collective communication; JobError if another process does not join, or
    joins with a different layout or version.
    """
    rank, n_processes = _rank_and_size()
    _check_sizes(model_parallel_size, pipeline_parallel_size, n_processes)
    if n_processes == 1:
        return ALONE
    if device.type not in ("cuda", "cpu"):
        raise RequestError(f"{n_processes} processes cannot work together on {device.type}: use --device cpu, or one process")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else code that uses the current device allocates memory on the first GPU
    agreement = _meet(rank, n_processes)
    layout = {"pipeline_parallel_size": pipeline_parallel_size, "the kind of device": device.type}
    agreement.check("joining the job", layout | {"the version of llama_ref": sys.modules["llama_ref"].__version__})
    n_parts = n_processes // pipeline_parallel_size
    with _stdout_kept():
        if not dist.is_initialized():
            options: dict[str, Any] = {"store": agreement.store, "rank": rank, "world_size": n_processes}
            if device.type == "cuda":
                dist.init_process_group("nccl", device_id=device, **options)
            else:
                dist.init_process_group("gloo", **options)
            atexit.register(_leave_group)
        mesh = init_device_mesh(device.type, (pipeline_parallel_size, n_parts), mesh_dim_names=("pipeline", "tensor"))
    return Job(
        Share(rank % n_parts, n_parts, rank // n_parts, pipeline_parallel_size),
        mesh.get_group("tensor") if n_parts > 1 else None,
        mesh.get_group("pipeline") if pipeline_parallel_size > 1 else None,
        agreement,
    )


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """Redirect stdout to stderr in the block: PyTorch 2.8's Gloo logs connections there.

    stdout must stay clean, because commands write their JSON there. Python's own output is flushed
    first.
    """
    try:
        sys.stdout.flush()
        os.fstat(2)
        kept = os.dup(1)
        os.dup2(2, 1)
    except (AttributeError, OSError, ValueError):  # one of the streams is closed
        yield
        return
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _meet(rank: int, n_processes: int) -> Agreement:
    """Find the other processes through torchrun's or the script's store, once per process."""
    global _agreement
    if _agreement is None:
        store = _get_default_store() if dist.is_initialized() else _connect()
        _agreement = Agreement(PrefixStore("llama_ref", store), rank, n_processes)
        atexit.register(_agreement.heartbeat.leave)
    return _agreement


def _connect() -> Store:
    """The store named in torchrun's environment. Raises JobError if it cannot be reached."""
    warning = threading.Timer(FIRST_WARNING_SECONDS, logger.warning, ["waiting for the other processes at %s", store_address()])
    warning.daemon = True
    warning.start()
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS)))
    except (dist.DistError, ValueError) as error:
        raise JobError(f"cannot reach the other processes at {store_address()}: {error}") from error
    finally:
        warning.cancel()
    store.set_timeout(STORE_TIMEOUT)
    return store


def _rank_and_size() -> tuple[int, int]:
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return _number("RANK", 0), _number("WORLD_SIZE", 1)


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdigit():
        raise RequestError(f"the environment variable {name} is {value!r}, expected a number; start with torchrun, or unset it")
    return int(value)


def _check_sizes(model_parallel_size: int | None, n_stages: int, n_processes: int) -> None:
    if not isinstance(n_stages, int) or n_stages < 1:
        raise RequestError(f"pipeline_parallel_size is {n_stages!r}, expected a whole number of 1 or more")
    if n_processes % n_stages:
        raise RequestError(
            f"pipeline_parallel_size is {n_stages}, but {n_processes} process(es) are not a multiple of it: start with "
            f"torchrun --nproc_per_node {n_stages}, twice as many, and so on, or leave it out"
        )
    if model_parallel_size not in (None, n_processes // n_stages):
        stages = f" in {n_stages} stages" if n_stages > 1 else ""
        raise RequestError(
            f"model_parallel_size is {model_parallel_size}, but there is {n_processes} process(es){stages}: start with "
            f"torchrun --nproc_per_node {model_parallel_size * n_stages}, or leave it out"
        )


def from_first(job: Job, call: Callable[[], T]) -> T:
    """Run `call` on the first process only, and broadcast its result or exception to all processes.

    The others wait without a timeout, for example for user input. The result must be picklable.
    """
    if not job.is_parallel:
        return call()
    result: list = [None, None]  # value, exception
    if dist.get_rank() == 0:
        try:
            result[0] = call()
        except Exception as error:
            result[1] = error
    dist.broadcast_object_list(result, src=0, group=_patient_group())
    value, raised = result
    if raised is not None:
        raise raised
    return value


@functools.cache
def _patient_group() -> ProcessGroup:
    with _stdout_kept():
        return dist.new_group(backend="gloo", timeout=TIMEOUT)


def lost_a_process(error: RuntimeError) -> bool:
    """Whether a collective call failed because another process has died."""
    signs = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "remote process exited")
    return dist.is_initialized() and any(sign in str(error) for sign in signs)


@contextmanager
def naming_a_lost_process() -> Iterator[None]:
    """Turn the RuntimeError of a collective call into a JobError if another process has died."""
    try:
        yield
    except RuntimeError as error:
        if not lost_a_process(error):
            raise
        raise JobError(LOST) from error


def end_process(code: int) -> None:
    """Exit one of several processes immediately; does nothing for a single process.

    A normal interpreter shutdown sometimes aborts in Gloo's threads ("terminate called without an
    active exception"), which torchrun reports as a failed job. A process that succeeded first waits
    for the others; if one of these fails, it reports its own error.
    """
    if _agreement is None and (not dist.is_initialized() or dist.get_world_size() == 1):
        return
    if code == 0 and dist.is_initialized():
        try:
            dist.barrier()
        except RuntimeError as error:
            if not lost_a_process(error):
                raise
            code = 1
    if _agreement is not None:
        _agreement.heartbeat.leave(failed=code in REPORTED)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
