"""What a test allows the code under it to use."""

import time
import tracemalloc
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from torch.profiler import ProfilerActivity, profile


def _holds_all_scores() -> bool:
    """Whether this PyTorch's attention on a CPU has no fused kernel for groups of query heads: 2.8 has none."""
    q, k = torch.zeros(1, 2, 8, 8), torch.zeros(1, 1, 8, 8)
    return torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=True) == 0  # `math`


fused_attention = pytest.mark.skipif(_holds_all_scores(), reason="attention on a CPU holds all scores in this PyTorch")


@contextmanager
def little_memory_and_time(megabytes: int = 100, seconds: float = 20):
    """Python's own allocations stay below `megabytes`; tracing them slows the block several times, hence the long limit."""
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
    """The most that tensors, those inside PyTorch's own functions included, held at a time while it ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()  # negative where memory is given back
        most = max(most, live)
    return most
