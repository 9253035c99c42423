"""Ctrl-C while a command line starts and ends: the process ends at once, with exit code 130.

Imports take half a second, and seconds with PyTorch. A KeyboardInterrupt there would be a traceback,
or be swallowed by what is imported; and nothing can be lost yet. Between start and end, inside
`interruptible`, Ctrl-C raises KeyboardInterrupt as always, but not while PyTorch is imported.

A script calls `exit_on_interrupt` before its other imports, so this module imports next to nothing.
"""

import os
import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager

from llama_ref.machine import thread_limit

EXIT_INTERRUPTED = 130
SHOW_CURSOR = "\x1b[?25h"  # which a progress bar hides


def exit_on_interrupt() -> None:
    """Let Ctrl-C end this process from now on, with a newline and without cleaning up.

    Changes nothing where Python would not raise KeyboardInterrupt: in a background job, which
    ignores Ctrl-C, under a caller's own handler, and in other threads than the first.
    """
    _replace(signal.default_int_handler, _exit)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt, so that what is under way is cleaned up."""
    replaced = _replace(_exit, _interrupt)
    try:
        yield
    finally:
        if replaced:
            signal.signal(signal.SIGINT, _exit)


def _exit(number: int, frame: types.FrameType | None) -> None:
    code, line = EXIT_INTERRUPTED, "\n"  # behind the ^C that a terminal shows
    if thread_limit.is_reached():  # OpenBLAS, which numpy loads, raises SIGINT then
        code, line = 1, f"llama-ref: {thread_limit.MESSAGE}\n"
    try:
        os.write(2, f"{SHOW_CURSOR if os.isatty(2) else ''}{line}".encode())
    finally:
        os._exit(code)


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    if _imports_torch(frame):  # its extensions swallow exceptions
        _exit(number, frame)
    raise KeyboardInterrupt


def _imports_torch(frame: types.FrameType | None) -> bool:
    """Whether PyTorch's first import is under way."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "torch":
            return True
        frame = frame.f_back
    return False


def _replace(handler: object, new: "signal._HANDLER") -> bool:
    """Set another handler if this one is set; whether it was."""
    if signal.getsignal(signal.SIGINT) is not handler:
        return False
    try:
        signal.signal(signal.SIGINT, new)
    except ValueError:  # only the first thread may
        return False
    return True
