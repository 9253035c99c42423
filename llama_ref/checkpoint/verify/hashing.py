"""Checksums of large files in constant memory, one thread per file."""

import hashlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path

from llama_ref.checkpoint.verify.presence import size_of
from llama_ref.machine.cores import cpu_count
from llama_ref.machine.waiting import as_they_end, interrupt_held
from llama_ref.progress import FileProgress

READ_BYTES = 1 << 20  # large enough to hide the cost of a call, small enough for the cache


class Cancelled(Exception):
    """Hashing was cancelled by another thread."""


def hash_file(
    path: str | Path, algorithm: str = "md5", progress: FileProgress | None = None, cancel: threading.Event | None = None
) -> str:
    """The hex checksum of one file. Raises OSError, or Cancelled if `cancel` is set."""
    with FileIO(path) as file:
        return hash_open_file(file, algorithm, progress, cancel)


def hash_open_file(
    file: FileIO, algorithm: str = "md5", progress: FileProgress | None = None, cancel: threading.Event | None = None
) -> str:
    """The hex checksum of an open file, from its current position. Raises the errors of `hash_file`."""
    path = Path(file.name)
    digest = hashlib.new(algorithm, usedforsecurity=False)
    # An anonymous map is page-aligned, so the kernel can copy whole pages.
    with mmap.mmap(-1, READ_BYTES) as buffer, memoryview(buffer) as view:
        total, done = os.fstat(file.fileno()).st_size, 0
        _read_ahead(file.fileno())
        while count := file.readinto(view):
            if cancel is not None and cancel.is_set():
                raise Cancelled(str(path))
            digest.update(view[:count])  # releases the interpreter lock
            done += count
            if progress:
                progress(path, done, total)
    return digest.hexdigest()


@dataclass(frozen=True)
class Hashed:
    """One file's checksum and the time to read and hash it."""

    sum: str
    seconds: float


def hash_files(
    wanted: Iterable[tuple[Path, str]], jobs: int | None = None, progress: FileProgress | None = None
) -> dict[Path, Hashed | OSError]:
    """Checksums of many (path, algorithm), `jobs` files at a time (default: one per core).

    The result for an unreadable file is its OSError. Large files go first, so that all cores finish
    together. An exception from outside (Ctrl-C) stops the threads at their next read.
    """
    cancel = threading.Event()
    out: dict[Path, Hashed | OSError] = {}

    def one(path: Path, algorithm: str) -> None:
        begun = time.perf_counter()
        try:
            out[path] = Hashed(hash_file(path, algorithm, progress, cancel), time.perf_counter() - begun)
        except OSError as error:
            out[path] = error

    largest_first = sorted(wanted, key=lambda job: -(size_of(job[0]) or 0))
    run_all([partial(one, *job) for job in largest_first], jobs, cancel)
    return out


def run_all(tasks: list[Callable[[], None]], jobs: int | None, cancel: threading.Event) -> None:
    """Run `tasks` on `jobs` threads; on an exception set `cancel`, wait and raise it."""
    with interrupt_held(), ThreadPoolExecutor(max_workers=jobs or cpu_count(), thread_name_prefix="hash") as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            for future in as_they_end(futures):
                future.result()
        except BaseException:
            cancel.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _read_ahead(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
