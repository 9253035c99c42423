"""What a test allows the code under it to use."""

import time
import tracemalloc
from contextlib import contextmanager


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
