"""Ctrl-C while a command starts or ends: exit at once, with code 130.

Imports take half a second, and several seconds with PyTorch. A KeyboardInterrupt during an import
would print a traceback or be swallowed by the imported module, and there is nothing to clean up
yet. Inside `interruptible`, Ctrl-C raises KeyboardInterrupt as usual, except while PyTorch is being
imported.

A script calls `exit_on_interrupt` before its other imports, so this module imports very little.
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
    """From now on, make Ctrl-C end this process with a newline and without cleanup.

    Does nothing where Python would not raise KeyboardInterrupt: in a background job, which ignores
    Ctrl-C, if the caller has set a handler, and in threads other than the main thread.
    """
    _replace(signal.default_int_handler, _exit)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt in this context, so that running code can clean up."""
    replaced = _replace(_exit, _interrupt)
    try:
        yield
    finally:
        if replaced:
            signal.signal(signal.SIGINT, _exit)


def _exit(number: int, frame: types.FrameType | None) -> None:
    code, line = EXIT_INTERRUPTED, "\n"  # after the ^C that a terminal shows
    if thread_limit.is_reached():  # then OpenBLAS, which numpy loads, raises SIGINT
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
    """Whether PyTorch is being imported for the first time."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "torch":
            return True
        frame = frame.f_back
    return False


def _replace(handler: object, new: "signal._HANDLER") -> bool:
    """Install the handler `new` if the current one is `handler`; return whether it did."""
    if signal.getsignal(signal.SIGINT) is not handler:
        return False
    try:
        signal.signal(signal.SIGINT, new)
    except ValueError:  # only the main thread may
        return False
    return True
