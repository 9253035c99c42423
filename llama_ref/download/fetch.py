"""Fetch one file in byte ranges, hash it as it arrives, and rename it when its checksum matches."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from llama_ref.checkpoint.size_limits import check_limit
from llama_ref.checkpoint.verify.checklist import CHECKLIST_NAME, Entry, read_checklist
from llama_ref.checkpoint.verify.hashing import Hashed
from llama_ref.download.part import Part, PrefixHash
from llama_ref.download.ranges import Segment
from llama_ref.download.requests.answers import check_answer, check_first_bytes, read_remote
from llama_ref.download.requests.outcomes import Changed, Refused, Stopped, Transient
from llama_ref.download.requests.retries import Retries
from llama_ref.download.requests.server import Server
from llama_ref.download.state import Remote, part_path, remove_part
from llama_ref.errors import CheckpointError, DownloadError
from llama_ref.progress import FileProgress

TICK_SECONDS = 0.1  # between two progress reports
SAVE_SECONDS = 2.0  # between two writes of the state file
HASH_BYTES = 64 << 20  # hashed at most between two progress reports
MOST_RESTARTS = 3  # attempts for a file that changes on the server

T = TypeVar("T")


@dataclass
class Fetcher:
    """State shared by all files of a download.

    `folder` is on the server; setting `stop` ends all threads.
    """

    server: Server
    folder: str
    jobs: int
    requests: ThreadPoolExecutor
    progress: FileProgress | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    counts: list[int] = field(default_factory=list)  # bytes received, one number per part

    @property
    def fetched_bytes(self) -> int:
        """Bytes received over the network."""
        return sum(self.counts)

    def look_up(self, name: str) -> Remote:
        """A file's length and version. Raises DownloadError or Stopped."""
        path = f"{self.folder}/{name}"

        def first_byte() -> Remote:
            with self.server.get(path, {"Range": "bytes=0-0"}) as answer:
                return read_remote(answer, self.server.link)

        return self._retried(first_byte)

    def fetch(self, path: Path, remote: Remote, entry: Entry | None) -> Hashed:
        """Fetch a file to `path`, where it appears once it is complete and matches the checklist.

        Raises DownloadError or Stopped. The bytes received are kept unless the checksum is wrong.
        """
        begun = time.perf_counter()
        for _ in range(MOST_RESTARTS):
            try:
                found = self._fetch_version(path, remote, entry)
                return Hashed(found, time.perf_counter() - begun)
            except Changed:
                before, remote = remote, self.look_up(path.name)
                if remote == before:  # the server answers range requests only sometimes
                    remote = replace(remote, is_ranged=False)
        raise DownloadError(f"{remote.address} changes on the server while it is fetched; start the command again later")

    def _fetch_version(self, path: Path, remote: Remote, entry: Entry | None) -> str:
        """Fetch one version of a file and rename it; returns its checksum.

        Raises Changed if the server replaces it.
        """
        check_limit(path, remote.total)
        with closing(Part(path, remote, self.jobs)) as part:
            found = self._arrive(part, entry.algorithm if entry else "md5")
            _check_content(part, found, entry)
            part.finish()
        return found

    def _arrive(self, part: Part, algorithm: str) -> str:
        """Receive and hash a whole part; returns its checksum."""
        digest, abandoned, here_before = PrefixHash(part, algorithm), threading.Event(), part.arrived
        pending: set[Future[None]] = {
            self.requests.submit(self._fetch_segment, part, segment, abandoned) for segment in part.segments if segment.rest
        }
        saved_at = time.monotonic()
        try:
            while pending or digest.lag:
                done, pending = wait(pending, 0 if digest.lag else TICK_SECONDS, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if self.stop.is_set():
                    raise Stopped
                digest.follow(HASH_BYTES)
                self._report(part)
                if time.monotonic() - saved_at > SAVE_SECONDS:
                    part.save()
                    saved_at = time.monotonic()
            return digest.sum()
        except BaseException:
            abandoned.set()
            for future in pending:
                future.cancel()
            wait(pending)
            part.save()
            raise
        finally:
            self.counts.append(part.arrived - here_before)

    def _fetch_segment(self, part: Part, segment: Segment, abandoned: threading.Event) -> None:
        """Fetch the rest of a segment, retrying as often as needed."""
        retries = Retries(self.stop)
        while segment.rest:
            before = segment.done
            try:
                self._request(part, segment, abandoned)
            except Transient as failure:
                has_progressed = part.remote.is_ranged and segment.done > before
                if not part.remote.is_ranged:
                    segment.done = 0
                retries.pause(failure, has_progressed)

    def _request(self, part: Part, segment: Segment, abandoned: threading.Event) -> None:
        remote, start = part.remote, segment.position
        headers = {}
        if remote.is_ranged:
            headers["Range"] = f"bytes={start}-{segment.stop - 1}"
            if remote.etag is not None:
                headers["If-Range"] = remote.etag
        with self.server.get(f"{self.folder}/{part.path.name}", headers) as answer:
            end = check_answer(answer, self.server.link, remote, start, segment.stop)
            for chunk in answer.chunks():
                if abandoned.is_set() or self.stop.is_set():
                    raise Stopped
                if segment.position == 0:
                    check_first_bytes(chunk, answer.address)
                part.write(segment, chunk[: end - segment.position])
        if segment.position == start:
            raise Transient(f"{remote.address}: the server sent no data")

    def _retried(self, action: Callable[[], T]) -> T:
        retries = Retries(self.stop)
        while True:
            failure = None
            try:
                return action()
            except Transient as error:
                failure = error
            retries.pause(failure)

    def _report(self, part: Part) -> None:
        if self.progress is not None:
            self.progress(part.path, part.arrived, part.remote.total)


def _check_content(part: Part, found: str, entry: Entry | None) -> None:
    """Raise DownloadError and remove a part that does not match the checklist.

    The checklist itself must be a valid list of checksums.
    """
    problem = None
    if entry is not None and found != entry.sum:
        problem = f"has the checksum {found}, {CHECKLIST_NAME} says {entry.sum}"
    if part.path.name == CHECKLIST_NAME:
        try:
            read_checklist(part_path(part.path))
        except CheckpointError as error:
            problem = f"is not a list of checksums ({error})"
    if problem:
        remove_part(part.path)
        raise DownloadError(
            f"{part.remote.address} {problem}; the partial file was removed, run the command again to fetch it from the start"
        )


def is_final(error: BaseException) -> bool:
    """Whether one file's error stops the other files too: a refusal or a disk error."""
    return isinstance(error, Refused) or isinstance(error.__cause__, OSError)
