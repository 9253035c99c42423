"""A partly downloaded file: written in ranges, hashed from its start, then renamed."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llama_ref.checkpoint.formats.atomic import ADVICE_WHEN_FULL
from llama_ref.checkpoint.formats.exchange import sync_entries
from llama_ref.checkpoint.verify.hashing import READ_BYTES
from llama_ref.download.ranges import Segment, arrived, cut, prefix
from llama_ref.download.state import Remote, as_lists, load_segments, part_path, remove_part, save_segments
from llama_ref.errors import DownloadError

NO_LINK = os.O_NOFOLLOW | os.O_CLOEXEC


class Part:
    """The file NAME.part, which is renamed to `path` when complete.

    Only this object's process writes it.
    """

    def __init__(self, path: Path, remote: Remote, jobs: int):
        """Open the file that an earlier run left, or create it.

        Raises DownloadError if it cannot be written.
        """
        self.path, self.remote = path, remote
        self.segments = load_segments(path, remote) if remote.is_ranged else []
        with _writing(path):
            if not self.segments:
                remove_part(path)
                self.segments = cut(remote.total, jobs) if remote.is_ranged else [Segment(0, remote.total)]
            self._file = os.open(part_path(path), os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
            os.ftruncate(self._file, remote.total)

    @property
    def arrived(self) -> int:
        """Number of bytes received, in any range."""
        return arrived(self.segments)

    @property
    def prefix(self) -> int:
        """Number of bytes received from the start without a gap."""
        return prefix(self.segments)

    def write(self, segment: Segment, data: bytes) -> None:
        """Write the next bytes of a segment.

        Raises DownloadError, for example if the disk is full.
        """
        with _writing(self.path), memoryview(data) as view:
            done = 0
            while done < len(view):
                done += os.pwrite(self._file, view[done:], segment.position + done)
        segment.done += len(data)

    def read(self, buffer: memoryview, position: int) -> int:
        """Read into a buffer; returns the number of bytes."""
        return os.preadv(self._file, [buffer], position)

    def save(self) -> None:
        """Sync the received bytes to disk, then write the state file that lists them.

        Raises DownloadError.
        """
        if not self.remote.is_ranged:  # such a download cannot be resumed
            return
        here = as_lists(self.segments)  # taken before fsync, which may miss bytes that arrive later
        with _writing(self.path):
            os.fsync(self._file)
            save_segments(self.path, self.remote, here)

    def close(self) -> None:
        """Close the file and keep it for the next run; remove it if it cannot be resumed."""
        os.close(self._file)
        if not self.remote.is_ranged:
            remove_part(self.path)

    def finish(self) -> None:
        """Give the file its final name."""
        with _writing(self.path):
            os.fsync(self._file)
            part_path(self.path).replace(self.path)
            remove_part(self.path)
            sync_entries(self.path.parent)


class PrefixHash:
    """The checksum of a part while it arrives: of the bytes from the start without a gap."""

    def __init__(self, part: Part, algorithm: str):
        self.part, self.position = part, 0
        self._digest = hashlib.new(algorithm, usedforsecurity=False)
        self._buffer = memoryview(bytearray(READ_BYTES))

    @property
    def lag(self) -> int:
        """Number of received bytes that are not hashed yet."""
        return self.part.prefix - self.position

    def follow(self, most: int) -> None:
        """Hash at most `most` of the bytes that are ready."""
        end = min(self.part.prefix, self.position + most)
        while self.position < end:
            n = self.part.read(self._buffer[: end - self.position], self.position)
            if not n:
                raise DownloadError(f"{part_path(self.part.path)} was truncated during the download; run the command again")
            self._digest.update(self._buffer[:n])
            self.position += n

    def sum(self) -> str:
        return self._digest.hexdigest()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError in the block into a DownloadError with advice."""
    try:
        yield
    except OSError as error:
        advice = ADVICE_WHEN_FULL.get(error.errno, "allow writing there")
        raise DownloadError(
            f"cannot write {part_path(path)}: {error.strerror}; {advice}. Downloaded data is kept for the next try"
        ) from error


def remove_empty(folder: Path) -> None:
    """Remove a folder if it is empty."""
    with suppress(OSError):
        folder.rmdir()
