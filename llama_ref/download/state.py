"""The state file of an unfinished download: its source, its version, and which bytes have arrived.

NAME.part is a sparse file of the full length. The state does not contain the link's query, so a
download can be continued with a new link.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_ref.download.ranges import Segment, arrived

STATE_LIMIT_BYTES = 1 << 20  # ample: the 405B's longest shard has a hundred ranges
VERSION = 1


@dataclass(frozen=True)
class Remote:
    """A file on the server: its URL without the query, its length in bytes, and its version.

    `etag` is None if the server gives no strong one. `is_ranged`: whether the server answers range
    requests.
    """

    address: str
    total: int
    etag: str | None
    is_ranged: bool = True


def part_path(path: Path) -> Path:
    """The path of a file while it is incomplete."""
    return path.with_name(f"{path.name}.part")


def state_path(path: Path) -> Path:
    """The path of an incomplete file's state."""
    return path.with_name(f"{path.name}.part.json")


def load_segments(path: Path, remote: Remote) -> list[Segment]:
    """Load the ranges of an unfinished file at `path`, with how much of each has arrived.

    Empty if there is no such file, or if it belongs to another version: then the download starts
    again.
    """
    try:
        status = part_path(path).lstat()
        with state_path(path).open("rb") as file:
            state = json.loads(file.read(STATE_LIMIT_BYTES))
        segments = [Segment(*map(_whole, each)) for each in state["segments"]]
        version = (state["version"], state["address"], state["total"], state["etag"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []
    is_same = version == (VERSION, remote.address, remote.total, remote.etag) and status.st_size == remote.total
    return segments if is_same and _cover(segments, remote.total) else []


def save_segments(path: Path, remote: Remote, segments: list[list[int]]) -> None:
    """Write the state atomically: after a crash, the old or the new state is there.

    Raises OSError.
    """
    content = {
        "version": VERSION,
        "address": remote.address,
        "total": remote.total,
        "etag": remote.etag,
        "segments": segments,
    }
    new = state_path(path).with_suffix(".json.new")
    with new.open("wb") as file:
        file.write(json.dumps(content).encode())
        file.flush()
        os.fsync(file.fileno())
    new.replace(state_path(path))


def bytes_here(path: Path, remote: Remote) -> int:
    """Number of bytes of an unfinished file that have arrived."""
    return arrived(load_segments(path, remote))


def remove_part(path: Path) -> None:
    """Remove an unfinished file and its state."""
    for each in (part_path(path), state_path(path), state_path(path).with_suffix(".json.new")):
        each.unlink(missing_ok=True)


def as_lists(segments: list[Segment]) -> list[list[int]]:
    """Segments as the state file holds them: [start, stop, done]."""
    return [list(asdict(segment).values()) for segment in segments]


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError
    return value


def _cover(segments: list[Segment], total: int) -> bool:
    """Whether valid ranges cover a whole file in order, without gaps or overlaps."""
    ends = [0, *(segment.stop for segment in segments)]
    follow = all(segment.start == end and segment.done >= 0 for segment, end in zip(segments, ends, strict=False))
    return follow and all(segment.rest >= 0 and segment.stop > segment.start for segment in segments) and ends[-1] == total
