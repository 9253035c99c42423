"""Detect and report that the limit on threads (`ulimit -u` or a container's pids) is reached."""

import _thread
import errno

MESSAGE = (
    "cannot start another thread or process: their number is limited here (see ulimit -u, or the container's "
    "pids limit); end other programs or raise the limit"
)
SIGNS = ("can't start new thread", "Resource temporarily unavailable", "thread constructor failed")


def is_reached() -> bool:
    """Whether this process can start no more threads."""
    try:
        _thread.start_new_thread(int, ())
    except RuntimeError as error:
        return caused(error)  # False at interpreter shutdown, when Python 3.12 starts no thread
    return False


def caused(error: Exception) -> bool:
    """Whether the limit is the reason for this error."""
    if isinstance(error, OSError):  # a full pipe's error has the same number, and says how much was written
        return error.errno == errno.EAGAIN and not hasattr(error, "characters_written")
    return isinstance(error, RuntimeError) and str(error).startswith(SIGNS)
