"""Several processes at one model: how they find each other, what each has to do, and how they end."""

import atexit
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

from llama_ref.errors import RequestError
from llama_ref.parallel.sharding import WHOLE, Share

PATIENCE = timedelta(days=30)  # with whoever types at the first process; communication usually gives up within half an hour

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """A process's share of the work, and the processes that it shares with: None where it is alone.

    The `tensor_group` holds the other parts of its stage's matrices, the `pipeline_group` its own part of the other stages.
    Neighbouring processes, which torchrun starts on one node, are in one tensor group: theirs is the more frequent talk.
    """

    share: Share = WHOLE
    tensor_group: ProcessGroup | None = None
    pipeline_group: ProcessGroup | None = None


ALONE = Job()


def join_job(model_parallel_size: int | None, pipeline_parallel_size: int, device: torch.device) -> Job:
    """This process's job: as torchrun's environment says, in `pipeline_parallel_size` stages; all of it where it is alone.

    Joins the others (NCCL on CUDA, else Gloo) unless the script already has. Raises RequestError where the stages do not divide
    the processes, `model_parallel_size`, which Meta's scripts pass, is not the number of processes of a stage, or the device is
    one over which processes cannot talk.
    """
    rank, n_processes = _place()
    _check_sizes(model_parallel_size, pipeline_parallel_size, n_processes)
    if n_processes == 1:
        return ALONE
    if device.type not in ("cuda", "cpu"):
        raise RequestError(f"{n_processes} processes cannot work together on {device.type}: take --device cpu, or one process")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # or whatever asks for the current one would take memory on the first card
    if not dist.is_initialized():
        bound = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
        dist.init_process_group(**bound)
        atexit.register(_leave_group)
    n_parts = n_processes // pipeline_parallel_size
    mesh = init_device_mesh(device.type, (pipeline_parallel_size, n_parts), mesh_dim_names=("pipeline", "tensor"))
    return Job(
        Share(rank % n_parts, n_parts, rank // n_parts, pipeline_parallel_size),
        mesh.get_group("tensor") if n_parts > 1 else None,
        mesh.get_group("pipeline") if pipeline_parallel_size > 1 else None,
    )


def _place() -> tuple[int, int]:
    """(this process's number, how many there are)."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return _number("RANK", 0), _number("WORLD_SIZE", 1)


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdigit():
        raise RequestError(f"the environment says {name}={value}, expected a number; start with torchrun, or unset it")
    return int(value)


def _check_sizes(model_parallel_size: int | None, n_stages: int, n_processes: int) -> None:
    if not isinstance(n_stages, int) or n_stages < 1:
        raise RequestError(f"pipeline_parallel_size is {n_stages!r}, expected a whole number of 1 or more")
    if n_processes % n_stages:
        raise RequestError(
            f"pipeline_parallel_size is {n_stages}, but {n_processes} process(es) are no multiple of it: start with "
            f"torchrun --nproc_per_node {n_stages}, twice as many, and so on, or leave it out"
        )
    if model_parallel_size not in (None, n_processes // n_stages):
        stages = f" in {n_stages} stages" if n_stages > 1 else ""
        raise RequestError(
            f"model_parallel_size is {model_parallel_size}, but there is {n_processes} process(es){stages}: start as many with "
            f"torchrun --nproc_per_node {model_parallel_size * n_stages}, or leave it out"
        )


def from_first(job: Job, call: Callable[[], T]) -> T:
    """What `call` gives on the first process, or raises there, on all of them: what is read there alone, all must know.

    The others wait however long it takes, as when a person types. It must be picklable.
    """
    if job is ALONE:
        return call()
    found: list = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = call()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found, src=0, group=_patient_group())
    value, error = found
    if error is not None:
        raise error
    return value


@functools.cache
def _patient_group() -> ProcessGroup:
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def lost_a_process(error: RuntimeError) -> bool:
    """Whether this is how a collective call says that another process has gone away."""
    signs = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "remote process exited")
    return dist.is_initialized() and any(sign in str(error) for sign in signs)


def end_process(code: int) -> None:
    """End one of several processes here and now; does nothing where there is only one.

    An interpreter that shuts down in its own time now and then aborts in Gloo's threads ("terminate called without an active
    exception"), which torchrun takes for a failed job. All wait for the slowest first, unless this one failed; where another
    fails meanwhile, that one has said why.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if code == 0:
        try:
            dist.barrier()
        except RuntimeError as error:
            if not lost_a_process(error):
                raise
            code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
