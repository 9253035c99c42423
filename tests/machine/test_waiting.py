"""Ctrl-C at any bytecode of the main thread, while it waits for other threads."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from interruptions import assert_prints_no_step
from llama_ref.cli import interrupt
from llama_ref.machine.waiting import as_they_end, interrupt_held, result_of

AT_MANY_STEPS = """
import threading
from interruptions import interrupt
from llama_ref.checkpoint.verify.hashing import run_all
from llama_ref.machine import waiting

waiting.TICK_SECONDS = 0.001

def ends_at(step):
    cancel = threading.Event()
    return interrupt(lambda: run_all([cancel.wait] * 3, 2, cancel), step) and threading.active_count() == 1

print([step for step in range(1, 2700, 11) if not ends_at(step)])
"""


def test_ctrl_c_at_any_step_ends_the_wait_and_the_threads(warm):
    assert_prints_no_step(warm / "python", AT_MANY_STEPS)


def test_ctrl_c_is_raised_where_the_block_waits():
    go, reached = threading.Event(), []
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(go.wait)
        with pytest.raises(KeyboardInterrupt), interrupt_held():
            signal.raise_signal(signal.SIGINT)
            reached.append("the wait")
            result_of(future)
            reached.append("more")
        go.set()
    assert reached == ["the wait"]


def test_a_commands_ctrl_c_is_held_too():
    # As commands set it; the default would end this process.
    before = signal.signal(signal.SIGINT, interrupt._exit)
    reached = []
    try:
        with interrupt.interruptible(), pytest.raises(KeyboardInterrupt), interrupt_held():
            signal.raise_signal(signal.SIGINT)
            reached.append("the end")
    finally:
        signal.signal(signal.SIGINT, before)
    assert reached == ["the end"]


def test_ctrl_c_is_raised_at_the_blocks_end():
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupt_held():
        signal.raise_signal(signal.SIGINT)
        reached.append("the end")
    assert reached == ["the end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_is_raised_at_once():
    with pytest.raises(KeyboardInterrupt, match="the second"), interrupt_held():
        signal.raise_signal(signal.SIGINT)
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the second") from None


def test_an_own_handler_is_called_once_and_another_thread_left_alone():
    came = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        with interrupt_held(), ThreadPoolExecutor(1) as pool:
            signal.raise_signal(signal.SIGINT)
            assert result_of(pool.submit(os.getpid)) == os.getpid()
            assert came == [signal.SIGINT]
        assert came == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)

    def in_a_thread() -> int:
        with interrupt_held(), ThreadPoolExecutor(1) as pool:
            return result_of(pool.submit(os.getpid))

    with ThreadPoolExecutor(1) as pool:
        assert result_of(pool.submit(in_a_thread)) == os.getpid()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_futures_come_as_they_end():
    first, second = threading.Event(), threading.Event()
    with ThreadPoolExecutor(2) as pool:
        futures = {"later": pool.submit(second.wait), "sooner": pool.submit(first.wait)}
        ended = as_they_end(futures.values())
        first.set()
        assert next(ended) is futures["sooner"]
        second.set()
        assert list(ended) == [futures["later"]]
