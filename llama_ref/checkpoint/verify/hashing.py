"""Sums of large files: constant memory, one thread per file, as fast as the disk and the cores allow."""

import hashlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llama_ref.checkpoint.verify.presence import size_of
from llama_ref.device import cpu_count
from llama_ref.progress import FileProgress

READ_BYTES = 1 << 20  # large enough that calls cost nothing, small enough that the bytes are hashed out of the core's cache


class Cancelled(Exception):
    """Hashing was broken off because another thread asked for it."""


def hash_file(
    path: str | Path, algorithm: str = "md5", progress: FileProgress | None = None, cancel: threading.Event | None = None
) -> str:
    """The hex sum of one file, read once through one buffer. Raises OSError, or Cancelled when `cancel` is set."""
    path = Path(path)
    digest = hashlib.new(algorithm, usedforsecurity=False)
    # An anonymous map is page-aligned, which lets the kernel copy whole pages; closed files and maps leave nothing behind.
    with path.open("rb", buffering=0) as file, mmap.mmap(-1, READ_BYTES) as buffer, memoryview(buffer) as view:
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
    """One file's sum, and how long it took to read and hash."""

    sum: str
    seconds: float


def hash_files(
    wanted: Iterable[tuple[Path, str]], jobs: int | None = None, progress: FileProgress | None = None
) -> dict[Path, Hashed | OSError]:
    """Sums of many (path, algorithm), `jobs` files at a time (default: one per core); an unreadable one's is its OSError.

    The largest files go first, so that no core is left alone with one at the end. An exception from outside (Ctrl-C) stops
    the threads at their next read.
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
    """Run `tasks` on at most `jobs` threads; on the first exception set `cancel`, wait for the rest, raise it."""
    with ThreadPoolExecutor(max_workers=jobs or cpu_count(), thread_name_prefix="hash") as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            for future in futures:
                future.result()
        except BaseException:
            cancel.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _read_ahead(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
