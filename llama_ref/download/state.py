"""What is known of an unfinished file, kept beside it: where it comes from, which version, which bytes are here.

NAME.part has the file's full length from the start, with holes where nothing has arrived. A link's
query is no part of the state: a new link goes on where the old one ended.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_ref.download.ranges import Segment, arrived

STATE_LIMIT_BYTES = 1 << 20  # the 405B's longest shard has a hundred ranges
VERSION = 1


@dataclass(frozen=True)
class Remote:
    """A file on the server: its address without the query, its length in bytes, and which version it is.

    `etag` is None if the server names no version. `is_ranged`: whether the server sends parts of it.
    """

    address: str
    total: int
    etag: str | None
    is_ranged: bool = True


def part_path(path: Path) -> Path:
    """Where a file is until it is whole."""
    return path.with_name(f"{path.name}.part")


def state_path(path: Path) -> Path:
    """Where it is written what has arrived of a file."""
    return path.with_name(f"{path.name}.part.json")


def load_segments(path: Path, remote: Remote) -> list[Segment]:
    """The ranges of an unfinished file at `path` with what has arrived of them.

    Empty without such a file, or if it belongs to another version: then it is started again.
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
    """Write the state; after a crash it is the old one or the new one. Raises OSError."""
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
    """How much of an unfinished file has arrived."""
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
    """Whether ranges are a file's, one after another."""
    ends = [0, *(segment.stop for segment in segments)]
    follow = all(segment.start == end and segment.done >= 0 for segment, end in zip(segments, ends, strict=False))
    return follow and all(segment.rest >= 0 and segment.stop > segment.start for segment in segments) and ends[-1] == total
