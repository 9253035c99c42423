"""Limits on the time and memory that tested code may use."""

import time
import tracemalloc
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from torch.profiler import ProfilerActivity, profile


def _holds_all_scores() -> bool:
    """Whether PyTorch's CPU attention lacks a fused kernel for grouped query heads, as 2.8 does."""
    q, k = torch.zeros(1, 2, 8, 8), torch.zeros(1, 1, 8, 8)
    return torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=True) == 0  # `math`


fused_attention = pytest.mark.skipif(_holds_all_scores(), reason="attention on a CPU holds all scores in this PyTorch")


@contextmanager
def little_memory_and_time(megabytes: int = 100, seconds: float = 20):
    """Check that Python's own allocations stay below `megabytes`.

    Tracing them slows the block several times, hence the long time limit.
    """
    begun = time.process_time()
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < megabytes << 20, f"{peak >> 20} MB"
    assert time.process_time() - begun < seconds


def peak_bytes(function: Callable[[], object]) -> int:
    """Peak bytes of all tensors while it ran, including those inside PyTorch's own functions."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()  # negative when memory is freed
        most = max(most, live)
    return most
