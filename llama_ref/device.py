"""Default device and precision."""

import os

import torch

from llama_ref.errors import RequestError
from llama_ref.formatting import did_you_mean

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}

# Before this version, masked attention with few queries, as in every decode step, silently gave
# wrong numbers on MPS (pytorch issues 163597, 174861 and 181133).
MPS_RIGHT_SINCE = "2.12"
AMPERE = (8, 0)  # the first NVIDIA GPUs with bfloat16
HOPPER = (9, 0)


def use_threads(n: int | None) -> None:
    """Set PyTorch's number of CPU threads in this process; None keeps its default."""
    if n is not None:
        torch.set_num_threads(n)


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The requested device; by default CUDA (under torchrun this process's card), else MPS, else the CPU.

    Raises RequestError for a device that is not available.
    """
    requested = _best() if device is None else device
    device = _own_card(requested)
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise RequestError(
            f"unknown device {device}, expected cuda, mps or cpu{did_you_mean(str(device), available)}"
        ) from error
    if chosen.type not in available:
        raise RequestError(f"device {device} is not supported, expected cuda, mps or cpu")
    if not available[chosen.type]:
        raise RequestError(f"device {requested} is not available here; leave it out to use one that is")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"no device {device}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    return chosen


def _own_card(device: str | torch.device) -> str | torch.device:
    """Replace "cuda" by this process's card: under torchrun, LOCAL_RANK is its number."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if str(device) == "cuda" else device


def _best() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() and torch.__version__ >= MPS_RIGHT_SINCE else "cpu"


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The requested dtype; by default bfloat16 if the device computes in it, else float16.

    Raises RequestError for an unsupported dtype.
    """
    if dtype is None:
        return torch.bfloat16 if _has_bfloat16(device) else torch.float16
    return named_dtype(dtype)


def named_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A supported dtype, by name ("bfloat16", "bf16", …) or as a dtype.

    Raises RequestError for others.
    """
    chosen = DTYPES.get(SHORT_NAMES.get(dtype, dtype)) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise RequestError(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
    return chosen


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported counts emulation (Colab's T4) and checks only the current
        # device.
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= AMPERE
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return True


def prepare_cuda(device: torch.device) -> None:
    """Disable cuDNN attention for the whole process, before a model is moved to a CUDA device.

    PyTorch since 2.11 prefers it on Hopper and Blackwell, where it builds a new plan for every
    length: 20 to 40 ms for each token of a growing text (transformers pull request 48163; vLLM
    disables it too). On Blackwell it also gave wrong numbers (pytorch issue 193893). The switch is
    process-wide: a context manager around each call would race between threads.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch raised this because memory ran out, on any device, or while it handled such an error.

    Capturing a CUDA graph that ran out of memory may end with another error, about the failed capture.
    """
    signs = ("out of memory", "can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    if isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs):
        return True
    return error.__context__ is not None and is_out_of_memory(error.__context__)
