"""Is this folder whole, which file is not, why, and what to do."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event

from llama_ref.checkpoint.checklist import ALGORITHM_OF_DIGITS, CHECKLIST_NAME, Entry, read_checklist
from llama_ref.checkpoint.folder import SHARD_NAME, native_folder, shard_number
from llama_ref.checkpoint.hashing import Hashed, Progress, hash_files, run_all
from llama_ref.checkpoint.presence import age_seconds, cannot_be_opened, checkpoint_files, partial_download, size_of, stamp_of
from llama_ref.checkpoint.report import STATE_OF_IMPOSTOR, FileReport, Report, State
from llama_ref.checkpoint.structure import MOST_SHARDS, Finding, Structure, examine
from llama_ref.checkpoint.weight_scan import scan_weights
from llama_ref.checkpoint.writing import write_sums
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.files import read_head, what_is

JUST_NOW_SECONDS = 10  # a broken file changed this recently may still be arriving
GROWTH_WAIT_SECONDS = 0.5

# Faults that reading the whole file would not tell more about.
CONCLUSIVE = {*STATE_OF_IMPOSTOR.values(), State.CUT_SHORT, State.LONGER, State.UNREADABLE, State.REFUSED}


def verify(
    folder: str | Path,
    *,
    jobs: int | None = None,
    quick: bool = False,
    deep: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Check a checkpoint folder against its checklist and itself. Never raises for what is on disk: the Report says it.

    Every file is looked at for what it is (kind, length, tensors against params.json, tokenizer against vocab_size), which
    is all that `quick` does. Otherwise the files are also hashed, `jobs` at a time (default: one per core), and compared
    with checklist.chk; where there is none, weights are compared with the CRC-32 sums inside their own archives. `deep`
    also looks for NaN and infinity in every weight. `progress(path, bytes done, bytes in all)` is called from threads.

    >>> report = verify("Llama3.2-1B-Instruct")
    >>> print(report.summary())
    >>> sys.exit(report.exit_code)
    """
    begun = time.perf_counter()
    if jobs is not None and (not isinstance(jobs, int) or jobs < 1):
        raise RequestError(f"jobs is {jobs!r}, expected a whole number of 1 or more")
    folder = native_folder(Path(folder).expanduser())
    if not folder.is_dir():
        return Report(folder, problem="there is no such folder")
    report = _Check(folder, jobs, quick, deep, progress).run()
    return replace(report, seconds=time.perf_counter() - begun)


def write_checklist(
    folder: str | Path,
    algorithm: str = "md5",
    force: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write checklist.chk over a folder's files in the form that `md5sum -c` (or `sha256sum -c`) reads; return its path.

    It appears whole or not at all. Raises RequestError for another algorithm or, without `force`, where a list is there
    already; CheckpointError where a file is broken as far as can be told, which a list would declare to be whole. Damage in
    params.json or tokenizer.model, or from before the archive was written, cannot be told: a list says what is here now.
    """
    folder = native_folder(Path(folder).expanduser())
    target = folder / CHECKLIST_NAME
    if algorithm not in ALGORITHM_OF_DIGITS.values():
        raise RequestError(f"algorithm is {algorithm!r}, expected md5 or sha256")
    if target.exists() and not force:
        raise RequestError(f"{target} is there already; --force replaces it")
    report = _Check(folder, jobs, progress=progress, use_list=False).run()  # also reads each archive's own CRC-32 sums
    names = [file.name for file in report.files]
    if report.bad or not names:
        raise CheckpointError(f"no list was written for {folder}: {report.bad[0].sentence() if names else report.summary()}")
    return write_sums(folder, names, algorithm, jobs, progress)


@dataclass
class _Check:
    """One run of `verify`: what to look at, what was found, one verdict per file."""

    folder: Path
    jobs: int | None
    quick: bool = False
    deep: bool = False
    progress: Progress | None = None
    use_list: bool = True

    def run(self) -> Report:
        present = checkpoint_files(self.folder)
        listed, list_problem, list_report, notes = self._read_list()
        names = list(dict.fromkeys([*listed, *present]))
        if not names:
            return Report(self.folder, list_report, "it holds no params.json, consolidated.NN.pth or tokenizer.model")
        verdicts = {name: fault for name in names if (fault := cannot_be_opened(self.folder, name))}
        openable = [name for name in names if name not in verdicts]
        stamps = {name: stamp_of(self.folder / name) for name in openable}

        hashed = self._hash([name for name in openable if name == "params.json"], listed)
        params_hold = all(_matches(listed.get(name), found) is not False for name, found in hashed.items())
        structure = examine(self.folder, openable, trust_params=params_hold)
        to_hash = [name for name in openable if name not in hashed and not _is_conclusive(structure.findings.get(name))]
        hashed |= self._hash(to_hash, listed)
        names += _missing_shards(names, structure, listed)
        for name in names:
            if name not in verdicts:
                verdicts[name] = self._judge(name, listed, hashed.get(name), structure)
        if self.deep or (not self.quick and not listed):
            self._scan(verdicts, structure)
        self._notice_growth(verdicts, stamps)
        files = [*list_report, *(verdicts[name] for name in names)]
        return Report(self.folder, files, None if self.quick and not list_report else list_problem, notes + structure.notes)

    def _read_list(self) -> tuple[dict[str, Entry], str | None, list[FileReport], list[str]]:
        """Entries by name, why there are none, the list's own report if it is bad, and what is odd about it."""
        path = self.folder / CHECKLIST_NAME
        if not self.use_list or not path.exists():
            return {}, f"there is no {CHECKLIST_NAME}, so no sums to compare with; the files' structure was checked", [], []
        try:
            found = read_checklist(path)
        except CheckpointError as error:
            kind = _impostor(path)
            state = STATE_OF_IMPOSTOR[kind] if kind else State.DAMAGED
            detail = kind or str(error).removeprefix(f"{path} ").removeprefix(f"{path}, ")
            report = FileReport(CHECKLIST_NAME, state, size_of(path), detail=detail)
            return {}, f"{CHECKLIST_NAME} could not be used", [report], []
        notes = []
        if found.unread_lines:
            lines = ", ".join(map(str, found.unread_lines[:5])) + (", …" if len(found.unread_lines) > 5 else "")
            notes.append(f"{CHECKLIST_NAME} has lines that are not in md5sum's form and were passed over: {lines}")
        return {entry.name: entry for entry in found.entries}, None, [], notes

    def _hash(self, names: Iterable[str], listed: Mapping[str, Entry]) -> dict[str, Hashed | OSError]:
        if self.quick:
            return {}
        paths = {self.folder / name: name for name in names if name in listed}
        found = hash_files([(path, listed[name].algorithm) for path, name in paths.items()], self.jobs, self.progress)
        return {paths[path]: result for path, result in found.items()}

    def _judge(
        self, name: str, listed: Mapping[str, Entry], hashed: Hashed | OSError | None, structure: Structure
    ) -> FileReport:
        path, entry, finding = self.folder / name, listed.get(name), structure.findings.get(name)
        report = FileReport(name, State.SOUND, size_of(path), expected_sum=entry.sum if entry else None)
        if report.size is None:
            return replace(report, state=State.MISSING, detail=partial_download(path))
        if isinstance(hashed, OSError):
            return replace(report, state=State.UNREADABLE, detail=hashed.strerror or str(hashed))
        if hashed:
            report = replace(report, found_sum=hashed.sum, seconds=hashed.seconds, state=State.WHOLE)
        if finding:
            report = replace(report, state=finding.state, detail=finding.detail, expected_size=finding.expected_size)
        if _matches(entry, hashed) is False:
            return _why_sum_differs(report, finding, listed)
        foreign = listed and not entry and SHARD_NAME.fullmatch(name)
        surplus = structure.n_shards is not None and shard_number(name) >= structure.n_shards
        if not finding and (foreign or surplus):
            detail = "the checklist does not name it" if foreign else f"the tensors are those of {structure.n_shards} shards"
            return replace(report, state=State.EXTRA, detail=detail)
        return report

    def _scan(self, verdicts: dict[str, FileReport], structure: Structure) -> None:
        cancel = Event()

        def one(name: str) -> None:
            path, begun = self.folder / name, time.perf_counter()
            try:
                scan = scan_weights(path, structure.tensors[name], values=self.deep, progress=self.progress, cancel=cancel)
            except (OSError, CheckpointError) as error:
                verdicts[name] = replace(verdicts[name], state=State.UNREADABLE, detail=str(error))
                return
            if verdicts[name].seconds is None:
                verdicts[name] = replace(verdicts[name], seconds=time.perf_counter() - begun)
            if scan.wrong_crc:
                detail = f"{scan.wrong_crc[0]} does not match the archive's own CRC-32"
                verdicts[name] = replace(verdicts[name], state=State.DAMAGED, detail=detail)
            elif scan.not_finite:
                detail = "; ".join(f"{tensor}: {nan} NaN, {inf} infinite" for tensor, (nan, inf) in scan.not_finite.items())
                verdicts[name] = replace(verdicts[name], state=State.NOT_FINITE, detail=detail)

        run_all([partial(one, name) for name in structure.tensors if verdicts[name].ok], self.jobs, cancel)

    def _notice_growth(self, verdicts: dict[str, FileReport], stamps: Mapping[str, tuple[int, int] | None]) -> None:
        """A file that changed during the check is not broken but unfinished; a broken one just written gets a moment."""
        short = [name for name in stamps if not verdicts[name].ok and age_seconds(self.folder / name) < JUST_NOW_SECONDS]
        if short and all(stamps[name] == stamp_of(self.folder / name) for name in short):
            time.sleep(GROWTH_WAIT_SECONDS)
        for name, stamp in stamps.items():
            now = stamp_of(self.folder / name)
            if now != stamp:
                size = size_of(self.folder / name)
                verdicts[name] = replace(verdicts[name], state=State.GROWING, size=size, detail="it changed during the check")


def _missing_shards(names: list[str], structure: Structure, listed: Mapping[str, Entry]) -> list[str]:
    """Files that must exist by the shards' numbers and shapes but do not; without a list also params.json and tokenizer."""
    numbers = {number for name in names if 0 <= (number := shard_number(name)) < MOST_SHARDS}
    count = max(numbers, default=-1 if listed else 0) + 1
    count = max(count, structure.n_shards or 0)
    missing = [f"consolidated.{number:02d}.pth" for number in range(count) if number not in numbers]
    return missing + [name for name in ("params.json", "tokenizer.model") if not listed and name not in names]


def _matches(entry: Entry | None, hashed: Hashed | OSError | None) -> bool | None:
    """Whether the sum is the listed one; None where there is nothing to compare."""
    return None if entry is None or not isinstance(hashed, Hashed) else entry.sum == hashed.sum


def _is_conclusive(finding: Finding | None) -> bool:
    return finding is not None and finding.state in CONCLUSIVE


def _why_sum_differs(report: FileReport, finding: Finding | None, listed: Mapping[str, Entry]) -> FileReport:
    owner = next((name for name, entry in listed.items() if entry.sum == report.found_sum and name != report.name), None)
    if owner:
        return replace(report, state=State.MISNAMED, detail=f"its content is that of {owner}")
    if finding and finding.if_altered:
        return replace(report, state=finding.if_altered)
    if finding and finding.state is not State.MISFIT:
        return report
    plain = "right length, wrong sum" if SHARD_NAME.fullmatch(report.name) else "wrong sum"
    return replace(report, state=State.DAMAGED, detail=finding.detail if finding else plain)


def _impostor(path: Path) -> str | None:
    try:
        return what_is(read_head(path))
    except CheckpointError:
        return None
