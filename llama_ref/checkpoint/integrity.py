"""Check a checkpoint folder: which files are broken, why, and what to do; write a checklist."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event

from llama_ref.checkpoint.advice.missing_file import hint_about
from llama_ref.checkpoint.advice.unusual_files import how_to_rename
from llama_ref.checkpoint.folder import checkpoints_root, native_folder, says_quantized
from llama_ref.checkpoint.formats.atomic import write_sums
from llama_ref.checkpoint.verify.checklist import ALGORITHM_OF_DIGITS, CHECKLIST_NAME, Entry, read_checklist
from llama_ref.checkpoint.verify.findings import listed
from llama_ref.checkpoint.verify.hashing import Hashed, hash_files, run_all
from llama_ref.checkpoint.verify.meta_shards import Finding, Structure, examine, oversize_finding
from llama_ref.checkpoint.verify.presence import (
    HUGGING_FACE,
    META,
    Format,
    age_seconds,
    cannot_be_opened,
    checkpoint_files,
    files_of,
    format_of,
    has_weights,
    names_in,
    size_of,
    stamp_of,
)
from llama_ref.checkpoint.verify.report import STATE_OF_IMPOSTOR, FileReport, Report, State
from llama_ref.checkpoint.verify.unwritten import zero_block
from llama_ref.checkpoint.verify.weight_scan import scan_safetensors, scan_weights
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.files import is_link_loop, read_head, what_is
from llama_ref.formatting import comma_list
from llama_ref.progress import FileProgress

JUST_NOW_SECONDS = 10  # a broken file that changed this recently may be a running download
GROWTH_WAIT_SECONDS = 0.5
MOST_SHOWN = 40  # characters of a line
MOST_NAMED = 4  # files in one sentence

NO_LIST = {
    META: f"there is no {CHECKLIST_NAME}, so no checksums to compare with; the files' structure was checked",
    HUGGING_FACE: (
        f"there is no {CHECKLIST_NAME}, and safetensors hold no checksums, so the bytes cannot be verified; "
        "the files' structure was checked"
    ),
}
# Faults that make hashing the file pointless.
CONCLUSIVE = {*STATE_OF_IMPOSTOR.values(), State.CUT_SHORT, State.LONGER, State.UNREADABLE, State.REFUSED}


def verify(
    folder: str | Path,
    *,
    jobs: int | None = None,
    quick: bool = False,
    deep: bool = False,
    progress: FileProgress | None = None,
    known: Mapping[Path, Hashed] | None = None,
) -> Report:
    """Check a checkpoint folder against its checklist and for consistency.

    Faults on disk never raise; the Report has them. First the structure is checked: each file's
    kind and length, the tensors against params.json or config.json and against one another, the
    tokenizer against vocab_size. `quick` stops there. Otherwise the files are hashed, `jobs` at a
    time (default: one per core), and compared with checklist.chk. Without a checklist, Meta's
    weights are compared with the CRC-32 checksums in their archives; safetensors have none. `deep`
    also looks for NaN, infinity and out-of-range values in every weight. `progress(path, bytes done,
    total bytes)` is called from threads. `known` has checksums of files that need no hashing again.

    >>> report = verify("Llama3.2-1B-Instruct")
    >>> print(report.summary())
    >>> sys.exit(report.exit_code)
    """
    started = time.perf_counter()
    if jobs is not None and (not isinstance(jobs, int) or jobs < 1):
        raise RequestError(f"jobs is {jobs!r}, expected a whole number of 1 or more")
    named = Path(folder).expanduser()
    try:
        folder = native_folder(named)
        if not folder.is_dir():
            return Report(folder, problem="there is no such folder")
    except OSError as error:
        return Report(named, problem=f"it cannot be read ({error.strerror})")
    report = _Check(folder, jobs, quick, deep, progress, known or {}).run()
    notes = [*_unchecked_notes(named, folder, {file.name for file in report.files}), *report.notes]
    return replace(report, notes=notes, seconds=time.perf_counter() - started)


def write_checklist(
    folder: str | Path,
    algorithm: str = "md5",
    force: bool = False,
    jobs: int | None = None,
    progress: FileProgress | None = None,
) -> Path:
    """Write checklist.chk for a folder's files, as `md5sum -c` or `sha256sum -c` reads it.

    Returns its path; the file is written atomically. Raises RequestError for another algorithm or,
    without `force`, for an existing list; CheckpointError for a file that is visibly broken. Damage
    in params.json or tokenizer.model, or from before a .pth was written, cannot be seen: the list
    describes the files as they are.
    """
    folder = native_folder(Path(folder).expanduser())
    target = folder / CHECKLIST_NAME
    if algorithm not in ALGORITHM_OF_DIGITS.values():
        raise RequestError(f"algorithm is {algorithm!r}, expected md5 or sha256")
    if target.exists() and not force:
        raise RequestError(f"{target} exists already; --force replaces it")
    report = _Check(folder, jobs, progress=progress, use_list=False).run()  # also reads each archive's own CRC-32 sums
    names = [file.name for file in report.files]
    if report.bad or not names:
        raise CheckpointError(f"no list was written for {folder}: {report.bad[0].sentence() if names else report.summary()}")
    return write_sums(folder, names, algorithm, jobs, progress)


@dataclass
class _Check:
    """One run of `verify`: its options, and the steps that lead to one verdict per file."""

    folder: Path
    jobs: int | None
    quick: bool = False
    deep: bool = False
    progress: FileProgress | None = None
    known: Mapping[Path, Hashed] = field(default_factory=dict)
    use_list: bool = True

    def run(self) -> Report:
        the_list = self._read_list()
        listed, list_report, notes = the_list.entries, the_list.reports, the_list.notes
        here = names_in(self.folder)
        form = format_of({*listed, *here})
        names = list(dict.fromkeys([*listed, *files_of(form, here), *self._quantized_files(form, here)]))
        if not names:
            return Report(self.folder, list_report, _why_no_files(self.folder))
        verdicts = {name: fault for name in names if (fault := cannot_be_opened(self.folder, name))}
        openable = [name for name in names if name not in verdicts]
        stamps = {name: stamp_of(self.folder / name) for name in openable}

        hashed = self._hash([name for name in openable if name == form.params], listed)
        right = _matches(listed.get(form.params), hashed.get(form.params))
        structure = examine(self.folder, names, form, not_to_open=verdicts.keys(), params_are_right=right)
        to_hash = [name for name in openable if name not in hashed and not _is_conclusive(structure.findings.get(name))]
        hashed |= self._hash(to_hash, listed)
        names += _missing(form, names, structure)
        for name in names:
            if name not in verdicts:
                verdicts[name] = self._judge(name, the_list, hashed, form, structure)
        _clear_misfits(verdicts, structure)
        if self.deep or (not self.quick and not listed and form is META):
            self._scan(verdicts, form, structure)
        self._mark_unwritten(verdicts)
        self._mark_growing(verdicts, stamps)
        files = [*list_report, *(verdicts[name] for name in names)]
        if form is HUGGING_FACE and not has_weights(form, here) and (pickles := [n for n in here if n.endswith(".bin")]):
            notes.append(f"the weights are pickles ({pickles[0]}), which are not read: fetch them as safetensors")
        if not has_weights(form, here) and (program := next((n for n in here if n.endswith(".pte")), None)):
            notes.append(
                f"{program} is an ExecuTorch program, which PyTorch cannot read: fetch Llama-Guard-3-1B, the guard in bf16"
            )
        if not has_weights(form, here) and (advice := how_to_rename(self.folder, here)):
            notes.append(advice)
        problem = the_list.problem or _not_compared(the_list, form, files)
        if other := next((file for file in files if file.state is State.UNSUPPORTED), None):
            problem = other.sentence()
        return Report(self.folder, files, problem, notes + structure.notes)

    def _quantized_files(self, form: Format, names: list[str]) -> list[str]:
        """Safetensors of a folder that this package quantized, which has a params.json instead."""
        quantized = form is META and not has_weights(META, names) and says_quantized(self.folder / META.params)
        return [name for name in names if HUGGING_FACE.weights.fullmatch(name)] if quantized else []

    def _read_list(self) -> "_List":
        path = self.folder / CHECKLIST_NAME
        if not self.use_list or not self._is_there(path):
            return _List()
        try:
            found = read_checklist(path)
        except CheckpointError as error:
            kind = _kind_of(path)
            broken = State.UNREADABLE if isinstance(error.__cause__, OSError) else State.DAMAGED
            state = STATE_OF_IMPOSTOR[kind] if kind else broken
            detail = kind or str(error).removeprefix(f"{path} ").removeprefix(f"{path}, ")
            report = FileReport(CHECKLIST_NAME, state, size_of(path), detail=detail)
            return _List(problem=f"{CHECKLIST_NAME} could not be used", reports=[report])
        notes = []
        if found.unread_lines:
            lines = comma_list(found.unread_lines, 5)
            notes.append(f"{CHECKLIST_NAME} has lines that are not in md5sum's format and were skipped: {lines}")
        reports = []
        if found.broken_off:
            detail = f"it breaks off at {found.broken_off[-MOST_SHOWN:]!r}"
            reports = [FileReport(CHECKLIST_NAME, State.CUT_SHORT, size_of(path), detail=detail)]
        return _List({entry.name: entry for entry in found.entries}, reports=reports, notes=notes)

    def _hash(self, names: Iterable[str], listed: Mapping[str, Entry]) -> dict[str, Hashed | OSError]:
        if self.quick:
            return {}
        paths = {self.folder / name: name for name in names if name in listed and not oversize_finding(self.folder / name)}
        found: dict[Path, Hashed | OSError] = {
            path: self.known[path] for path, name in paths.items() if self._is_known(path, listed[name])
        }
        wanted = [(path, listed[name].algorithm) for path, name in paths.items() if path not in found]
        found |= hash_files(wanted, self.jobs, self.progress)
        return {paths[path]: result for path, result in found.items()}

    def _is_known(self, path: Path, entry: Entry) -> bool:
        """Whether the file has a known sum of the list's kind."""
        return path in self.known and len(self.known[path].sum) == len(entry.sum)

    @staticmethod
    def _is_there(path: Path) -> bool:
        try:
            return is_link_loop(path) or path.exists()
        except OSError:  # such as a folder that may not be searched
            return True

    def _judge(
        self,
        name: str,
        the_list: "_List",
        all_hashed: Mapping[str, Hashed | OSError],
        form: Format,
        structure: Structure,
    ) -> FileReport:
        listed, hashed = the_list.entries, all_hashed.get(name)
        path, entry, finding = self.folder / name, listed.get(name), structure.findings.get(name)
        report = FileReport(name, State.SOUND, size_of(path), expected_sum=entry.sum if entry else None)
        if report.size is None:
            unnamed = f"{CHECKLIST_NAME} does not name it either" if listed and not entry else ""
            return replace(report, state=State.MISSING, detail=hint_about(path) or unnamed)
        if isinstance(hashed, OSError):
            return replace(report, state=State.UNREADABLE, detail=hashed.strerror or str(hashed))
        if hashed:
            report = replace(report, found_sum=hashed.sum, seconds=hashed.seconds, state=State.WHOLE)
        if finding:
            report = replace(report, state=finding.state, detail=finding.detail, expected_size=finding.expected_size)
        if _matches(entry, hashed) is False:
            return _why_sum_differs(report, finding, form, listed, all_hashed)
        is_needed = structure.is_counted and name in structure.needed and name not in structure.surplus
        foreign = the_list.is_whole and not entry and form.weights.fullmatch(name) and not is_needed
        is_odd = finding and finding.state is not State.COPY
        if not is_odd and (foreign or name in structure.surplus):
            detail = "the checklist does not name it" if foreign else structure.surplus[name]
            return replace(report, state=State.EXTRA, detail=detail)
        return report

    def _scan(self, verdicts: dict[str, FileReport], form: Format, structure: Structure) -> None:
        cancel = Event()

        def one(name: str) -> None:
            path, started = self.folder / name, time.perf_counter()
            try:
                if form is HUGGING_FACE:
                    scan = scan_safetensors(path, structure.safetensors[name], progress=self.progress, cancel=cancel)
                else:
                    tensors = structure.pth[name]
                    scan = scan_weights(path, tensors, values=self.deep, progress=self.progress, cancel=cancel)
            except (OSError, CheckpointError) as error:
                verdicts[name] = replace(verdicts[name], state=State.UNREADABLE, detail=str(error))
                return
            if verdicts[name].seconds is None:
                verdicts[name] = replace(verdicts[name], seconds=time.perf_counter() - started)
            if scan.wrong_crc:
                detail = f"{scan.wrong_crc[0]} does not match the archive's own CRC-32"
                verdicts[name] = replace(verdicts[name], state=State.DAMAGED, detail=detail)
            elif scan.not_finite:
                detail = "; ".join(f"{tensor}: {nan} NaN, {inf} infinite" for tensor, (nan, inf) in scan.not_finite.items())
                verdicts[name] = replace(verdicts[name], state=State.NOT_FINITE, detail=detail)
            elif scan.out_of_range:
                counts = (f"{tensor}: {n:,} impossible number{'s' * (n > 1)}" for tensor, n in scan.out_of_range.items())
                verdicts[name] = replace(verdicts[name], state=State.DAMAGED, detail=listed([*counts]))

        names = [name for name in (*structure.pth, *structure.safetensors) if verdicts[name].ok]
        run_all([partial(one, name) for name in names], self.jobs, cancel)

    def _mark_unwritten(self, verdicts: dict[str, FileReport]) -> None:
        """Mark damaged files with a block of zeros: reserved on the disk, but not fully written."""
        for name, report in verdicts.items():
            if report.state is State.DAMAGED and (offset := zero_block(self.folder / name)) is not None:
                detail = f"{report.detail}; zero bytes at {offset:,}"
                verdicts[name] = replace(report, state=State.UNWRITTEN, detail=detail)

    def _mark_growing(self, verdicts: dict[str, FileReport], stamps: Mapping[str, tuple[int, int] | None]) -> None:
        """Mark files that changed during the check; wait a moment if a broken file is very new."""
        short = [name for name in stamps if not verdicts[name].ok and age_seconds(self.folder / name) < JUST_NOW_SECONDS]
        if short and all(stamps[name] == stamp_of(self.folder / name) for name in short):
            time.sleep(GROWTH_WAIT_SECONDS)
        for name, stamp in stamps.items():
            now = stamp_of(self.folder / name)
            if now != stamp:
                size = size_of(self.folder / name)
                verdicts[name] = replace(verdicts[name], state=State.GROWING, size=size, detail="it changed during the check")


@dataclass(frozen=True)
class _List:
    """The result of reading checklist.chk: entries by name, the problem if it could not be used,
    its own report if it is bad, and notes.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    problem: str | None = None
    reports: list[FileReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return bool(self.entries) and not self.reports


def _not_compared(the_list: _List, form: Format, files: Iterable[FileReport]) -> str | None:
    """Why some good files have no checksum to be compared with; None if all have one."""
    if not the_list.entries and not the_list.reports:
        return NO_LIST[form]
    names = [file.name for file in files if file.ok and file.name not in the_list.entries]
    if not names:
        return None
    shown = ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if names[MOST_NAMED:] else "")
    return f"{CHECKLIST_NAME} does not name {shown}, so the bytes cannot be verified"


def _missing(form: Format, names: list[str], structure: Structure) -> list[str]:
    """Missing files: implied by the weights' numbers, shapes or index, or needed by any model."""
    missing = [name for name in structure.needed if name not in names]
    if not missing and not any(has_weights(each, names) for each in (META, HUGGING_FACE)):
        missing = [form.first_weights]
    if form.params not in names and not structure.has_known_params:
        missing.append(form.params)
    return missing if any(name in names for name in form.tokenizers) else [*missing, form.tokenizers[0]]


def _why_no_files(folder: Path) -> str:
    """Why there is nothing to check, and which of the folders inside are checkpoints."""
    problem = "it holds no params.json, consolidated.NN.pth or tokenizer.model, and no config.json or model.safetensors"
    places = {name: (folder / name, folder / name / "original") for name in names_in(folder)}
    within = [name for name, either in places.items() if any(map(checkpoint_files, either))]
    if not within:
        return problem
    shown = comma_list(within, 4)
    try:
        is_root = folder.resolve() == checkpoints_root().resolve()
    except (OSError, RuntimeError):
        is_root = False
    if is_root:
        return f"it is the folder of all checkpoints: name one of {shown}, or check them all with --all"
    return f"{problem}; the folders in it do: name one of {shown}"


def _unchecked_notes(named: Path, folder: Path, checked: set[str]) -> list[str]:
    """Notes about files of the other format, if a repository has both."""
    form = format_of({*checked, *names_in(folder)})
    other = HUGGING_FACE if form is META else META
    beside = [name for name in names_in(folder) if other.weights.fullmatch(name) and name not in checked]
    if beside:
        return [f"{folder.name}/ holds {other.whose} weights too ({beside[0]}), which were not checked"]
    if folder != named and has_weights(HUGGING_FACE, names_in(named)):
        return ["Meta's files in original/ were checked; the safetensors beside that folder were not"]
    if form is HUGGING_FACE and files_of(META, names_in(named / "original")):
        return ["the safetensors were checked; original/, which holds no weights, was not"]
    return []


def _matches(entry: Entry | None, hashed: Hashed | OSError | None) -> bool | None:
    """Whether the checksum matches the listed one; None if either is missing."""
    return None if entry is None or not isinstance(hashed, Hashed) else entry.sum == hashed.sum


def _is_conclusive(finding: Finding | None) -> bool:
    return finding is not None and finding.state in CONCLUSIVE


def _why_sum_differs(
    report: FileReport,
    finding: Finding | None,
    form: Format,
    listed: Mapping[str, Entry],
    hashed: Mapping[str, Hashed | OSError],
) -> FileReport:
    owners = [name for name, entry in listed.items() if entry.sum == report.found_sum and name != report.name]
    there = [name for name in owners if _matches(listed[name], hashed.get(name))]
    if there:
        return replace(report, state=State.COPY, detail=f"of {there[0]}, which is here too")
    for owner in owners:
        return replace(report, state=State.MISNAMED, detail=f"its content is that of {owner}")
    if finding and finding.if_altered:
        return replace(report, state=finding.if_altered)
    if finding and finding.state not in (State.MISFIT, State.UNSUPPORTED):
        return report
    plain = "right length, wrong sum" if form.weights.fullmatch(report.name) else "wrong sum"
    return replace(report, state=State.DAMAGED, detail=finding.detail if finding else plain)


def _is_right(report: FileReport) -> bool:
    """Whether the checksum matches the listed one."""
    return report.found_sum is not None and report.found_sum == report.expected_sum


def _clear_misfits(verdicts: dict[str, FileReport], structure: Structure) -> None:
    """Clear misfits of files with the right checksum if other, broken files explain them."""
    doubtful = [name for name, finding in structure.findings.items() if finding.by_others]
    if any(not report.ok for name, report in verdicts.items() if name not in doubtful or not _is_right(report)):
        for name in doubtful:
            if not verdicts[name].ok and _is_right(verdicts[name]):
                verdicts[name] = replace(verdicts[name], state=State.WHOLE, detail="")


def _kind_of(path: Path) -> str | None:
    try:
        return what_is(read_head(path))
    except CheckpointError:
        return None
