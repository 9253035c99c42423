"""Download a release into a folder, or repair a folder's missing and damaged files."""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_ref.checkpoint.formats.atomic import check_free_space
from llama_ref.checkpoint.integrity import verify
from llama_ref.checkpoint.releases import Release
from llama_ref.checkpoint.verify.checklist import CHECKLIST_NAME, Entry, read_checklist
from llama_ref.checkpoint.verify.hashing import Hashed, hash_files
from llama_ref.checkpoint.verify.presence import size_of
from llama_ref.checkpoint.verify.report import FileReport, Report, State
from llama_ref.download.fetch import Fetcher, is_final
from llama_ref.download.files import file_names, is_weights, remote_folders
from llama_ref.download.folder_lock import folder_lock
from llama_ref.download.link import SignedLink
from llama_ref.download.part import remove_empty
from llama_ref.download.requests.outcomes import Refused, Stopped
from llama_ref.download.requests.server import opened
from llama_ref.download.state import Remote, bytes_here
from llama_ref.errors import CheckpointError, DownloadError, RequestError
from llama_ref.machine.waiting import as_they_end, interrupt_held, result_of
from llama_ref.progress import FileProgress

FILES_AT_ONCE = 2  # the second file starts while the first waits for its last bytes and its checksum
HEADROOM = 1.01  # factor on the free disk space required, for the file system's overhead

logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """Result of a download: the checksums of fetched files, and the folder's report."""

    folder: Path
    report: Report
    fetched: Mapping[str, Hashed] = field(default_factory=dict)
    fetched_bytes: int = 0
    seconds: float = 0.0


def wanted_files(release: Release, only: Collection[str] = ()) -> tuple[str, ...]:
    """The names of a release's files, or the subset `only`.

    Raises RequestError for an unknown name.
    """
    names = file_names(release)
    strange = next((name for name in only if name not in names), None)
    if strange is not None:
        raise RequestError(f"{release.name} has no file {strange!r:.60}, expected one of {', '.join(names)}")
    return tuple(name for name in names if not only or name in only)


def download(
    release: Release,
    link: SignedLink,
    folder: Path,
    *,
    only: Collection[str] = (),
    replace: Collection[str] = (),
    jobs: int = 4,
    allowed_hosts: Collection[str] = (),
    progress: FileProgress | None = None,
    hashing: FileProgress | None = None,
    known: Mapping[str, Hashed] | None = None,
) -> Outcome:
    """Fetch a release's missing files, with `jobs` requests at a time, and verify the folder.

    A file gets its final name only when it is complete and its checksum matches the checklist.
    Existing files are kept, except those in `replace`, which are replaced once the new ones are
    complete. `known` holds checksums of files that need not be hashed again. `progress` and
    `hashing` are called from worker threads. Raises RequestError for an expired link, DownloadError
    if a file cannot be fetched; the bytes received so far are kept.
    """
    names = wanted_files(release, only)
    to_fetch = (CHECKLIST_NAME, *(name for name in names if name != CHECKLIST_NAME))
    if not 1 <= jobs <= 64:
        raise RequestError(f"jobs is {jobs}, expected a whole number from 1 to 64")
    link.check_date()
    begun = time.perf_counter()
    try:
        with folder_lock(folder):
            missing = [name for name in to_fetch if name in replace or not (folder / name).exists()]
            fetched, n_bytes = {}, 0
            if missing:
                with interrupt_held(), opened(link, allowed_hosts, jobs) as server, ThreadPoolExecutor(jobs) as requests:
                    fetcher = Fetcher(server, "", jobs, requests, progress)
                    fetched = _Release(release, folder, fetcher, missing).fetch()
                    n_bytes = fetcher.fetched_bytes
            sums = {**(known or {}), **fetched}
            report = check(release, folder, names, sums, progress=hashing)
    finally:
        remove_empty(folder)
    return Outcome(folder, report, fetched, n_bytes, time.perf_counter() - begun)


def repair(
    release: Release,
    folder: Path,
    link: Callable[[], SignedLink],
    *,
    jobs: int = 4,
    allowed_hosts: Collection[str] = (),
    progress: FileProgress | None = None,
    hashing: FileProgress | None = None,
) -> Outcome:
    """Verify a folder and fetch missing and damaged files again.

    `link` is called only if there are any.
    Raises the same errors as `download`.
    """
    names = wanted_files(release)
    report = check(release, folder, names, {}, progress=hashing)
    fetched: dict[str, Hashed] = {}
    n_bytes, begun = 0, time.perf_counter()
    # The checklist first: a damaged one says nothing about the other files.
    for chosen in ((CHECKLIST_NAME,), names):
        wrong = [name for name in chosen if name in _wrong(report, folder, names)]
        if wrong:
            outcome = download(
                release,
                link(),
                folder,
                only=() if chosen == names else wrong,
                replace=wrong,
                jobs=jobs,
                allowed_hosts=allowed_hosts,
                progress=progress,
                hashing=hashing,
                known=_sums(report),
            )
            fetched |= outcome.fetched
            n_bytes += outcome.fetched_bytes
            report = outcome.report if chosen == names else check(release, folder, names, _sums(report), progress=hashing)
    return Outcome(folder, report, fetched, n_bytes, time.perf_counter() - begun)


def check(
    release: Release,
    folder: Path,
    names: Collection[str],
    known: Mapping[str, Hashed],
    *,
    progress: FileProgress | None = None,
) -> Report:
    """Check a release's folder with `verify`.

    For a subset of files or an unloadable release, compare checksums only.
    """
    if set(names) == set(file_names(release)) and can_be_loaded(release):
        return verify(folder, known={folder / name: hashed for name, hashed in known.items()}, progress=progress)
    return _compare(folder, [name for name in names if name != CHECKLIST_NAME], known, progress)


def _compare(folder: Path, names: Collection[str], known: Mapping[str, Hashed], progress: FileProgress | None) -> Report:
    """Compare files with the checksums in the folder's checklist only."""
    try:
        entries = entries_of(folder)
    except CheckpointError as error:
        return Report(folder, [FileReport(CHECKLIST_NAME, State.DAMAGED, detail=str(error))])
    there = [name for name in names if name in entries and (folder / name).is_file() and name not in known]
    found = hash_files([(folder / name, entries[name].algorithm) for name in there], progress=progress)
    sums = {**known, **{path.name: hashed for path, hashed in found.items() if isinstance(hashed, Hashed)}}
    files = [_compared(folder / name, entries.get(name), sums.get(name)) for name in names]
    unlisted = [name for name in names if name not in entries]
    problem = f"{CHECKLIST_NAME} does not name {', '.join(unlisted)}" if unlisted else None
    return Report(folder, files, problem)


def _compared(path: Path, entry: Entry | None, hashed: Hashed | None) -> FileReport:
    size = size_of(path)
    if size is None:
        return FileReport(path.name, State.MISSING)
    if entry is None or hashed is None:
        return FileReport(path.name, State.SOUND if entry is None else State.UNREADABLE, size)
    is_right = entry.sum == hashed.sum
    state, detail = (State.WHOLE, "") if is_right else (State.DAMAGED, "wrong sum")
    return FileReport(path.name, state, size, None, entry.sum, hashed.sum, detail, hashed.seconds)


def can_be_loaded(release: Release) -> bool:
    """Whether `verify` can check the release: it cannot read ExecuTorch programs (.pte)."""
    return not any(name.endswith(".pte") for name in file_names(release))


def entries_of(folder: Path) -> dict[str, Entry]:
    """The entries of a folder's checklist by file name. Raises CheckpointError."""
    return {entry.name: entry for entry in read_checklist(folder / CHECKLIST_NAME).entries}


def _wrong(report: Report, folder: Path, names: Iterable[str]) -> set[str]:
    """The names of files that are missing or damaged."""
    broken = {file.name for file in report.bad}
    return {name for name in names if name in broken or not (folder / name).exists()}


def _sums(report: Report) -> dict[str, Hashed]:
    """The checksums of the files that a report found intact."""
    return {file.name: Hashed(file.found_sum, file.seconds or 0.0) for file in report.files if file.ok and file.found_sum}


class _Release:
    """One run that fetches the given files of a release."""

    def __init__(self, release: Release, folder: Path, fetcher: Fetcher, names: Collection[str]):
        self.release, self.folder, self.fetcher = release, folder, fetcher
        self.names = names
        self.fetched: dict[str, Hashed] = {}

    def fetch(self) -> dict[str, Hashed]:
        """Fetch the files; returns their checksums.

        Raises DownloadError with the first of several errors.
        """
        with ThreadPoolExecutor(FILES_AT_ONCE) as files:
            try:
                self.fetcher.folder = result_of(files.submit(self._find_folder))
                small = [name for name in self.names if not is_weights(name)]
                weights = [name for name in self.names if is_weights(name)]
                for name in small:  # in order: the checklist comes first
                    self._all([files.submit(self._fetch, name)])
                remotes = self._look_up(weights)
                self._check_space(remotes)
                self._all([files.submit(self._fetch, name, remotes[name]) for name in weights])
            except BaseException:
                self.fetcher.stop.set()
                self.fetcher.server.abort()
                raise
        return self.fetched

    def _find_folder(self) -> str:
        """The release's folder on the server: the first that answers, else the last candidate."""
        *others, last = remote_folders(self.release)
        for candidate in others:
            self.fetcher.folder = candidate
            try:
                self.fetcher.look_up(next(iter(self.names)))
                return candidate
            except Refused:
                logger.info("the server has no folder %s", candidate)
        return last

    def _fetch(self, name: str, remote: Remote | None = None) -> None:
        remote = remote or self.fetcher.look_up(name)
        entry = entries_of(self.folder).get(name) if name != CHECKLIST_NAME else None
        self.fetched[name] = self.fetcher.fetch(self.folder / name, remote, entry)

    def _look_up(self, names: Iterable[str]) -> dict[str, Remote]:
        futures = {name: self.fetcher.requests.submit(self.fetcher.look_up, name) for name in names}
        self._all(futures.values())
        return {name: future.result() for name, future in futures.items()}

    def _check_space(self, remotes: Mapping[str, Remote]) -> None:
        """Report the initial progress.

        Raises CheckpointError if the remaining bytes do not fit on the disk.
        """
        rest = sum(remote.total - bytes_here(self.folder / name, remote) for name, remote in remotes.items())
        check_free_space(self.folder, int(rest * HEADROOM))
        if self.fetcher.progress is not None:
            for name, remote in remotes.items():
                self.fetcher.progress(self.folder / name, bytes_here(self.folder / name, remote), remote.total)

    def _all(self, futures: Iterable[Future[Any]]) -> None:
        """Wait for all futures; a fatal error stops the others. Raises the first error."""
        errors: list[Exception] = []
        for future in as_they_end(futures):
            try:
                future.result()
            except Stopped:
                pass
            except Exception as error:
                errors.append(error)
                if is_final(error):
                    self.fetcher.stop.set()
                    self.fetcher.server.abort()
        if len(errors) > 1:
            raise DownloadError(f"{errors[0]} ({len(errors) - 1} more of the files failed too)")
        if errors:
            raise errors[0]
