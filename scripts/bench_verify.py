"""Compare the speed of checking files with `md5sum`, for one file and for four.

    python scripts/bench_verify.py [--size 1GB|100MB] [--rounds 3] [--jobs N] [--cold] [--folder DIR]

Every contender reads the same files in turn; the best round of each counts. The files are in the
page cache. With `--cold` they are dropped from it before each reading, which then measures the disk
too.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import fire

from llama_ref.checkpoint.verify.hashing import hash_files
from llama_ref.errors import RequestError
from llama_ref.machine.cores import cpu_count

UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
BLOCK_BYTES = 1 << 20


def main(size: str = "1GB", rounds: int = 3, jobs: int | None = None, cold: bool = False, folder: str | None = None) -> None:
    """Print GB/s of `md5sum` and of this package over one and over four files of `size`."""
    n_bytes, jobs = bytes_of(size), jobs or cpu_count()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        files = [make_file(Path(scratch) / f"file{index}", n_bytes) for index in range(4)]
        for count in (1, 4):
            measured = race(contenders(files[:count], jobs), files[:count], rounds, cold)
            md5sum_seconds = measured["md5sum"]
            for name, seconds in measured.items():
                rate = count * n_bytes / seconds / 1e9
                print(f"{count} x {size}  {name:<24} {rate:6.3f} GB/s  {md5sum_seconds / seconds:5.2f} x md5sum")


def bytes_of(size: str) -> int:
    match = re.fullmatch(r"(\d+) ?(kB|MB|GB)?", str(size))
    if not match:
        raise RequestError(f"--size is {size!r}, expected a number of bytes such as 1GB or 100MB")
    return int(match[1]) * UNITS[match[2] or ""]


def make_file(path: Path, n_bytes: int) -> Path:
    """Write a file of random bytes, the same in every block."""
    block = os.urandom(BLOCK_BYTES)
    with path.open("wb") as file:
        for start in range(0, n_bytes, BLOCK_BYTES):
            file.write(block[: n_bytes - start])
    return path


def contenders(files: list[Path], jobs: int) -> dict[str, Callable[[], object]]:
    """The contenders: `md5sum` on all files in sequence, this package with one job and `jobs`."""
    out: dict[str, Callable[[], object]] = {
        "md5sum": lambda: subprocess.run(["md5sum", *files], check=True, capture_output=True),
        "llama-ref, 1 job": lambda: hash_files([(path, "md5") for path in files], 1),
    }
    if len(files) > 1:
        out[f"llama-ref, {jobs} jobs"] = lambda: hash_files([(path, "md5") for path in files], jobs)
    return out


def race(runners: dict[str, Callable[[], object]], files: list[Path], rounds: int, cold: bool) -> dict[str, float]:
    """Seconds of each runner's best round; rounds alternate, so that a slow phase affects all."""
    best = dict.fromkeys(runners, float("inf"))
    for _ in range(rounds):
        for name, run in runners.items():
            for path in files:
                prepare(path, cold)
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def prepare(path: Path, cold: bool) -> None:
    """Read a file into the page cache, or drop it from there."""
    with path.open("rb", buffering=0) as file:
        if cold:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            buffer = bytearray(BLOCK_BYTES)
            while file.readinto(buffer):
                pass


if __name__ == "__main__":
    if not shutil.which("md5sum"):
        raise SystemExit("bench_verify compares with md5sum, which is not installed")
    try:
        fire.Fire(main)
    except RequestError as error:
        raise SystemExit(f"bench_verify: {error}") from None
