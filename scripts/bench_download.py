"""Compare `llama-ref download` with curl, both from a server on this machine.

    python scripts/bench_download.py [--size 1GB] [--rounds 3] [--jobs 4] [--limit 100MB] [--folder DIR]

The server sends a file of random bytes from the page cache, at most `--limit` bytes a second over
all connections, as a network would; by default, as fast as it can. curl runs with one stream, with
as many ranges at a time as there are jobs, and followed by `md5sum`; ours always includes the
checksum. The best round of each counts. The CPU use of all programs is also printed.
"""

import base64
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

import fire

from bench_verify import bytes_of, make_file
from llama_ref.checkpoint.releases import find_release
from llama_ref.download.link import SignedLink, parse_link
from llama_ref.download.release import download
from llama_ref.machine.busy import OtherPrograms
from llama_ref.machine.cores import cpu_count

RELEASE = find_release("Llama3.2-1B")
PIECE_BYTES = 1 << 20
REMOTE, NAME = "Llama-3.2-1B", "consolidated.00.pth"


def main(size: str = "1GB", rounds: int = 3, jobs: int = 4, limit: str | None = None, folder: str | None = None) -> None:
    """Print GB/s of curl and of this package for a file of `size`."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        place = Path(scratch)
        (place / REMOTE).mkdir()
        n_bytes = bytes_of(size)
        file = make_file(place / REMOTE / NAME, n_bytes)
        (place / REMOTE / "checklist.chk").write_text(f"{md5(file)}  {NAME}\n")
        own, other = multiprocessing.Pipe()
        server = multiprocessing.Process(target=serve, args=(place, other, bytes_of(limit) if limit else None), daemon=True)
        server.start()
        try:
            compare(place, own.recv(), n_bytes, jobs, rounds)
        finally:
            server.kill()
            server.join()


def md5(path: Path) -> str:
    return subprocess.run(["md5sum", path], check=True, capture_output=True, text=True).stdout.split()[0]


def compare(place: Path, host: str, n_bytes: int, jobs: int, rounds: int) -> None:
    others = OtherPrograms()
    best: dict[str, float] = {}
    runners = contenders(place / "out", host, n_bytes, jobs)
    for _ in range(rounds):
        for name, run in runners.items():
            subprocess.run(["rm", "-rf", place / "out"], check=True)
            (place / "out").mkdir()
            begun = time.perf_counter()
            run()
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - begun)
    ours = best.pop(f"llama-ref, {jobs} jobs, MD5 included")
    for name, seconds in best.items():
        print(f"{name:<36} {n_bytes / seconds / 1e9:6.3f} GB/s   ours is {seconds / ours:4.2f} x")
    print(f"{f'llama-ref, {jobs} jobs, MD5 included':<36} {n_bytes / ours / 1e9:6.3f} GB/s")
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    print(f"{cpu_count()} cores, of which the server needs some; load {load}; all programs used {others.cores():.1f} cores")


def contenders(out: Path, host: str, n_bytes: int, jobs: int) -> dict[str, Callable[[], object]]:
    """The programs to compare, by name; each downloads the file into the empty folder `out`."""
    address = f"http://{host}/{REMOTE}/{NAME}"
    link = parse_link(make_link(host), [host])
    step = -(-n_bytes // jobs)
    ranges = [(start, min(start + step, n_bytes) - 1) for start in range(0, n_bytes, step)]

    def curl() -> None:
        subprocess.run(["curl", "-sSf", "-o", out / NAME, address], check=True)

    def curl_ranges() -> None:
        words = ("curl", "-sSf", "-o")
        running = [subprocess.Popen([*words, out / f"{first}", "-r", f"{first}-{last}", address]) for first, last in ranges]
        codes = [process.wait() for process in running]
        if any(codes):
            raise SystemExit("curl failed")

    def curl_and_md5() -> None:
        curl()
        md5(out / NAME)

    def ours() -> None:
        fetch(link, out, jobs, host)

    return {
        "curl, one stream": curl,
        f"curl, {jobs} ranges, no sum": curl_ranges,
        "curl, one stream, then md5sum": curl_and_md5,
        f"llama-ref, {jobs} jobs, MD5 included": ours,
    }


def fetch(link: SignedLink, out: Path, jobs: int, host: str) -> None:
    outcome = download(RELEASE, link, out, only=[NAME], jobs=jobs, allowed_hosts=[host])
    if not outcome.report.ok:
        raise SystemExit(outcome.report.summary())


def make_link(host: str) -> str:
    """A link like Meta's signed ones, which expires in a day."""
    condition = {"DateLessThan": {"AWS:EpochTime": int(time.time()) + 86400}}
    policy = json.dumps({"Statement": [{"Resource": f"http://{host}/*", "Condition": condition}]}).encode()
    encoded = base64.b64encode(policy).decode().translate(str.maketrans("+=/", "-_~"))
    return f"http://{host}/*?Policy={encoded}&Signature=none&Key-Pair-Id=none"


# ---- the server


def serve(place: Path, told: Connection, limit: int | None) -> None:
    """Send files by `sendfile`, whole or in ranges, until this process is killed."""
    handler = type("Here", (Handler,), {"place": place, "pace": Pace(limit)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    told.send(f"127.0.0.1:{server.server_address[1]}")
    server.serve_forever()


class Pace:
    """Limits the bytes that all connections together send per second."""

    def __init__(self, limit: int | None):
        self.limit, self.free_at, self.lock = limit, 0.0, threading.Lock()

    def wait(self, n_bytes: int) -> None:
        if self.limit is None:
            return
        with self.lock:
            now = time.monotonic()
            self.free_at = max(self.free_at, now) + n_bytes / self.limit
            seconds = self.free_at - now
        time.sleep(seconds)


class Handler(BaseHTTPRequestHandler):
    """Answers a connection's requests; everything is allowed."""

    protocol_version = "HTTP/1.1"
    place: Path
    pace: Pace

    def do_GET(self) -> None:
        with (self.place / self.path.partition("?")[0].lstrip("/")).open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, stop = (int(wanted[1]), int(wanted[2]) + 1) if wanted else (0, total)
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{total}")
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            while start < stop:
                n_bytes = min(stop - start, PIECE_BYTES)
                self.pace.wait(n_bytes)
                start += os.sendfile(self.connection.fileno(), file.fileno(), start, n_bytes)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    fire.Fire(main)
