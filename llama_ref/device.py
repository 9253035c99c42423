"""Which device and which precision, when nobody says."""

import contextlib
import os
from collections.abc import Iterator

import torch

from llama_ref.errors import RequestError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}

# Attention of few queries with a mask, as every decode step has it, silently gave wrong numbers on MPS before
# (pytorch issues 163597, 174861 and 181133).
MPS_RIGHT_SINCE = "2.12"
AMPERE = (8, 0)  # NVIDIA's first with bfloat16


def cpu_count() -> int:
    """The number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """CUDA when there is one (this process's, under torchrun), else MPS, else the CPU; or what is asked for.

    Raises RequestError for a device that is not there.
    """
    wish = _best() if device is None else device
    device = _own_of_several(wish)
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise RequestError(f"device {device} is unknown; try cuda, mps or cpu") from error
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if chosen.type not in there:
        raise RequestError(f"device {device} is not supported; try cuda, mps or cpu")
    if not there[chosen.type]:
        raise RequestError(f"device {wish} is not available here; leave it out to use what is")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"device {device} is not there: this machine has {torch.cuda.device_count()} CUDA device(s)")
    return chosen


def _own_of_several(device: str | torch.device) -> str | torch.device:
    """Of a machine's CUDA devices, this process's where none is named: torchrun numbers its processes."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if str(device) == "cuda" else device


def _best() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() and torch.__version__ >= MPS_RIGHT_SINCE else "cpu"


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it, else float16; or what is asked for, by name or dtype. Raises RequestError."""
    if dtype is None:
        return torch.bfloat16 if _has_bfloat16(device) else torch.float16
    return named_dtype(dtype)


def named_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype that models run in, by name ("bfloat16", "bf16", …) or as it is. Raises RequestError."""
    chosen = DTYPES.get(SHORT_NAMES.get(dtype, dtype)) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        raise RequestError(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
    return chosen


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        # Not torch.cuda.is_bf16_supported: it counts emulation, as on Colab's T4, and asks the current device, not this one.
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= AMPERE
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return True


@contextlib.contextmanager
def fast_for_one_row(tokens: torch.Tensor, dtype: torch.dtype) -> Iterator[None]:
    """Let a CPU multiply bfloat16 matrices with a single token's state the faster way.

    oneDNN rearranges the matrix first, which pays for many rows only; PyTorch's own kernel took two thirds of its time for one
    (`llama-ref bench`). The switch is the process's: it is set back before anything else runs on this thread.
    """
    if tokens.numel() > 1 or tokens.device.type != "cpu" or dtype != torch.bfloat16:
        yield
        return
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def prepare_cuda(device: torch.device) -> None:
    """Keep cuDNN's attention off, for the whole process, where a model is about to be put on a CUDA device.

    PyTorch from 2.11 on prefers it on Hopper and Blackwell, and it plans anew for every length: 20 to 40 ms for each token of a
    text that grows (transformers pull request 48163, vLLM does the same). On Blackwell it also gave wrong numbers (pytorch
    issue 193893). The switch is process-wide, so that a context manager around each call would race between threads.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether this is how torch says that there is no memory left, on any device."""
    signs = ("out of memory", "can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)
