"""Check whether this package's Triton kernels run on a device."""

import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def uses_triton(x: Tensor) -> bool:
    """Whether this package's kernels run on x's device."""
    return x.is_cuda and has_triton(x.device)


@cache
def has_triton(device: torch.device) -> bool:
    """Whether a kernel compiles and computes there; tried once.

    PyTorch for CUDA includes Triton on Linux. It needs a C compiler, and a card that its release supports.
    """
    if device.type != "cuda" or not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    try:
        from llama_ref.compiled.triton.elementwise import row_stats

        ids, _ = row_stats(torch.arange(40.0, device=device)[None])
        return int(ids) == 39
    except Exception as error:  # of many types: no compiler, no headers, an old card
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        logger.warning("Triton does not work here (%s): PyTorch's own kernels are used, which are slower", reason)
        return False
