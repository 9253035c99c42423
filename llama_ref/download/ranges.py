"""Split a file into byte ranges, one request each, and track how much of each has arrived."""

import re
from dataclasses import dataclass

LARGEST = 1_000_000_000  # bytes per request; CloudFront refuses more than 27 GB
SMALLEST = 16_000_000
TURNS = 16  # ranges per job and file: many, so that little is left to hash when the last ranges arrive
CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


@dataclass
class Segment:
    """The bytes from `start` to `stop` (exclusive), of which the first `done` have arrived."""

    start: int
    stop: int
    done: int = 0

    @property
    def position(self) -> int:
        """File offset of the next byte."""
        return self.start + self.done

    @property
    def rest(self) -> int:
        return self.stop - self.position


def cut(total: int, jobs: int) -> list[Segment]:
    """Ranges for a file of `total` bytes: TURNS per job, of SMALLEST to LARGEST bytes."""
    size = min(LARGEST, max(SMALLEST, -(-total // (jobs * TURNS))))
    return [Segment(start, min(start + size, total)) for start in range(0, total, size)]


def arrived(segments: list[Segment]) -> int:
    """Total number of bytes that have arrived."""
    return sum(segment.done for segment in segments)


def prefix(segments: list[Segment]) -> int:
    """Number of bytes that have arrived from the file's start without a gap."""
    for segment in segments:
        if segment.rest:
            return segment.position
    return segments[-1].stop if segments else 0


@dataclass(frozen=True)
class ContentRange:
    """The bytes in an answer, from `start` to `stop` (exclusive), and the file's `total` length."""

    start: int
    stop: int
    total: int


def read_content_range(header: str | None) -> ContentRange | None:
    """Parse a header such as `bytes 0-99/1000`; None if it is malformed or inconsistent."""
    match = CONTENT_RANGE.fullmatch((header or "").strip())
    if match is None:
        return None
    first, last, total = map(int, match.groups())
    return ContentRange(first, last + 1, total) if first <= last < total else None
