"""A file in ranges: each is one request, and says how much of it has arrived."""

import re
from dataclasses import dataclass

LARGEST = 1_000_000_000  # bytes a request; CloudFront refuses more than 27 GB
SMALLEST = 16_000_000
TURNS = 16  # ranges that one job fetches of a file: the last ones, which are hashed at the end, are a small part
CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


@dataclass
class Segment:
    """The bytes from `start` up to `stop`, of which the first `done` have arrived."""

    start: int
    stop: int
    done: int = 0

    @property
    def position(self) -> int:
        """Where the next byte goes."""
        return self.start + self.done

    @property
    def rest(self) -> int:
        return self.stop - self.position


def cut(total: int, jobs: int) -> list[Segment]:
    """Ranges for a file of `total` bytes: TURNS for each of the `jobs`, unless they were too large or small."""
    size = min(LARGEST, max(SMALLEST, -(-total // (jobs * TURNS))))
    return [Segment(start, min(start + size, total)) for start in range(0, total, size)]


def arrived(segments: list[Segment]) -> int:
    """Bytes of a file that have arrived, wherever they lie."""
    return sum(segment.done for segment in segments)


def prefix(segments: list[Segment]) -> int:
    """Bytes from the file's start on that have arrived without a gap."""
    for segment in segments:
        if segment.rest:
            return segment.position
    return segments[-1].stop if segments else 0


@dataclass(frozen=True)
class ContentRange:
    """Which bytes an answer holds, `start` up to `stop`, of how many in the file."""

    start: int
    stop: int
    total: int


def read_content_range(header: str | None) -> ContentRange | None:
    """Read `bytes 0-99/1000`; None if it is anything else or contradicts itself."""
    match = CONTENT_RANGE.fullmatch((header or "").strip())
    if match is None:
        return None
    first, last, total = map(int, match.groups())
    return ContentRange(first, last + 1, total) if first <= last < total else None
