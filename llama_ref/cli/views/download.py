"""What `llama-ref link` and `llama-ref download` print."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from llama_ref.checkpoint.folder import checkpoints_root
from llama_ref.checkpoint.releases import Release
from llama_ref.cli.terminal import live_progress, note
from llama_ref.cli.views.verify import print_reports
from llama_ref.download.files import estimated_bytes, file_names, remote_folders
from llama_ref.download.link import SignedLink
from llama_ref.download.release import Outcome
from llama_ref.formatting import human_bytes, printable
from llama_ref.progress import FileProgress


def print_link(link: SignedLink, release: Release | None, *, as_json: bool) -> None:
    """Print a link's host and expiry, and a release's files and size, but never the link."""
    if as_json:
        print(json.dumps(_link_as_json(link, release), indent=2))
        return
    known = link.known_releases()
    print(f"host      {link.host}{f', known for {known}' if known else ''}")
    print(f"link      {link.lifetime()}")
    if release is not None:
        n_bytes = estimated_bytes(release)
        print(f"release   {release.name}, {'of unknown size' if n_bytes is None else f'about {human_bytes(n_bytes)}'}")
        print(f"from      {' or '.join(link.address(folder) for folder in remote_folders(release))}")
        print(f"into      {printable(str(checkpoints_root() / release.folder))}")
        print(f"files     {', '.join(file_names(release))}")


def _link_as_json(link: SignedLink, release: Release | None) -> dict:
    head = {
        "host": link.host,
        "known_for": link.known_releases(),
        "expires": link.expires.isoformat(),
        "has_ended": link.has_ended(),
    }
    if release is None:
        return head
    return head | {
        "release": release.name,
        "from": [link.address(folder) for folder in remote_folders(release)],
        "into": str(checkpoints_root() / release.folder),
        "files": list(file_names(release)),
        "estimated_bytes": estimated_bytes(release),
    }


def print_outcome(outcome: Outcome, *, as_json: bool) -> None:
    """Print the folder's `verify` report, and on stderr how much was fetched."""
    if as_json:
        report = json.loads(outcome.report.to_json())
        fetched = {"fetched": sorted(outcome.fetched), "fetched_bytes": outcome.fetched_bytes}
        print(json.dumps(report | fetched | {"seconds": round(outcome.seconds, 3)}, indent=2))
        return
    print_reports([outcome.report], as_json=False)
    if outcome.fetched:
        rate = human_bytes(outcome.fetched_bytes / max(outcome.seconds, 1e-9))
        n = len(outcome.fetched)
        note(f"[{n} file{'s' * (n > 1)}, {human_bytes(outcome.fetched_bytes)} in {outcome.seconds:.1f} s, {rate}/s]")
    else:
        note("[nothing was missing; `--repair` fetches damaged files again]" if outcome.report.bad else "[nothing was missing]")


@contextmanager
def download_bars() -> Iterator[tuple[FileProgress, FileProgress]]:
    """Show a bar per file being fetched or hashed, and one for the total.

    Silent if stderr is not a terminal. Yields the progress callbacks for fetching and for hashing.
    """
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with live_progress(*columns) as bars:
        yield _Bars(bars, "in all").report, _Bars(bars, "hashed").report


class _Bars:
    """A progress bar for each file that is being processed, and one for their total."""

    def __init__(self, bars: Progress, title: str):
        self.bars, self.title = bars, title
        self.total: TaskID | None = None
        self.tasks: dict[Path, TaskID] = {}
        self.counts: dict[Path, tuple[int, int]] = {}
        self.lock = Lock()

    def report(self, path: Path, done: int, total: int) -> None:
        """Report that `done` of `total` bytes of a file are done."""
        with self.lock:
            self.counts[path] = done, total
            n_done, n_total = map(sum, zip(*self.counts.values(), strict=True))
            if path not in self.tasks:  # what an earlier run fetched does not count for the speed
                self.tasks[path] = self.bars.add_task(printable(path.name), total=total, completed=done)
            if self.total is None:
                self.total = self.bars.add_task(self.title, total=n_total, completed=n_done)
            self.bars.update(self.tasks[path], completed=done, total=total, visible=0 < done < total)
            self.bars.update(self.total, completed=n_done, total=n_total)
