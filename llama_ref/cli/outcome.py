"""Standard streams, logging, exit codes and one-line errors of a command line."""

import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_ref.cli.escapes import escape_on_terminals
from llama_ref.cli.interrupt import EXIT_INTERRUPTED, interruptible
from llama_ref.errors import FolderNotFound, LlamaRefError, RequestError
from llama_ref.machine import thread_limit

EXIT_BAD, EXIT_MISUSE, EXIT_CLOSED_PIPE = 1, 2, 141  # verify and guard also have 3


def guarded(action: Callable[[], int | None]) -> int:
    """Run an action and return its exit code (None: 0); report an error in one line.

    0 success, 1 failure, 2 misuse, 130 interrupted, 141 the reader of the output closed the pipe.
    """
    try:
        with interruptible():
            code = action() or 0
            sys.stdout.flush()
        return code
    except (RequestError, FolderNotFound) as error:
        return report_error(error, EXIT_MISUSE)
    except LlamaRefError as error:
        return report_error(error, EXIT_BAD)
    except BrokenPipeError:
        return EXIT_CLOSED_PIPE
    except OSError as error:
        return report_error(_known_os_error(error), EXIT_BAD)
    except RuntimeError as error:
        known = _known_failure(error)
        if known is None:
            raise
        return report_error(known, EXIT_BAD)
    except KeyboardInterrupt:
        if thread_limit.is_reached():  # then OpenBLAS, which numpy loads, raises SIGINT
            return report_error(LlamaRefError(thread_limit.MESSAGE), EXIT_BAD)
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        _drop_what_cannot_be_written()


def _drop_what_cannot_be_written() -> None:
    """If stdout cannot be written, send its buffer to /dev/null: the flush at exit would fail."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _known_os_error(error: OSError) -> Exception:
    """Explain a full disk behind standard output, and a reached thread limit.

    Other errors already name their file.
    """
    if thread_limit.caused(error):
        return LlamaRefError(thread_limit.MESSAGE)
    if error.errno != errno.ENOSPC or error.filename is not None:
        return error
    return LlamaRefError(f"cannot write the output: {error.strerror}; send it elsewhere or free some space there")


def _known_failure(error: RuntimeError) -> LlamaRefError | None:
    """Explain an error of Python or PyTorch to the user; None if it is a bug."""
    if thread_limit.caused(error):
        return LlamaRefError(thread_limit.MESSAGE)
    from llama_ref.device import is_out_of_memory
    from llama_ref.parallel.job import LOST, lost_a_process

    if is_out_of_memory(error):
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        return LlamaRefError(
            f"out of memory ({first_line}): `llama-ref info` says how much a checkpoint needs; "
            "try --dtype bfloat16, a smaller --max_seq_len, --device cpu, or a smaller release"
        )
    if lost_a_process(error):
        return LlamaRefError(LOST)
    return None


def configure_stdio(silent: bool = False) -> None:
    """Make stdio tolerant: replace unencodable characters; open /dev/null for closed streams.

    A shell closes a stream with `>&-`. `silent` sends standard output to /dev/null, too. On
    terminals, control characters are escaped.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None or (silent and name == "stdout"):
            # Stays open until the process ends.
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    escape_on_terminals()


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Show the package's log records, INFO and above, as plain lines on stderr.

    Only command lines use this: users of the library see no INFO records. A level that the caller
    has set on the logger "llama_ref" is kept.
    """
    logger = logging.getLogger("llama_ref")
    handler, level = _NoteHandler(), logger.level
    logger.addHandler(handler)
    if level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _NoteHandler(logging.Handler):
    """Writes records with `terminal.note`: once for all processes of a job, above a progress bar.

    Every rank writes records with `any_rank`: which process a job waits for, or has lost
    (parallel/peers.py). A critical record is the error that ends a process; a job reports one.
    """

    def emit(self, record: logging.LogRecord) -> None:
        from llama_ref.cli.terminal import note

        try:
            if record.levelno >= logging.CRITICAL:
                report_error(LlamaRefError(self.format(record)), EXIT_BAD)
            elif getattr(record, "any_rank", False):
                print(self.format(record), file=sys.stderr, flush=True)
            else:
                note(self.format(record))
        except Exception:
            self.handleError(record)


def report_error(error: Exception, code: int) -> int:
    """Print an error, once per job, and return the exit code."""
    from llama_ref.formatting import hide_queries, printable

    if _is_first_to_report():
        lines = hide_queries(f"llama-ref: {error}").split("\n")  # it may contain a link by mistake
        # A file's name may contain terminal escapes.
        print(*map(printable, lines), sep="\n", file=sys.stderr)
    return code


def _is_first_to_report() -> bool:
    """Whether no other process of the torchrun job has reported an error: one message is enough.

    Torchrun gives each process the name of an error file, below a folder for this attempt at the
    job.
    """
    own_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not own_file:
        return True
    try:
        (Path(own_file).parent.parent / "reported").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass
    return True
