"""The result of `verify` as plain data: a state and advice per file, and a one-line summary."""

import json
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path

from llama_ref.checkpoint.verify.checklist import CHECKLIST_NAME
from llama_ref.files import ADVICE as ADVICE_ON_IMPOSTOR
from llama_ref.formatting import human_bytes, printable


class State(str, Enum):
    """The state of a file. The values appear in tables and JSON."""

    WHOLE = "whole"
    SOUND = "sound"  # everything was checked except the checksum
    MISSING = "missing"
    EMPTY = "empty"
    CUT_SHORT = "cut short"
    LONGER = "longer"
    DAMAGED = "damaged"
    MISNAMED = "misnamed"
    COPY = "a copy"
    WEB_PAGE = "web page"
    ERROR_BODY = "error body"
    POINTER = "Git LFS pointer"
    UNWRITTEN = "unwritten"
    GROWING = "still growing"
    UNREADABLE = "unreadable"
    REFUSED = "refused"
    MISFIT = "does not fit"
    EXTRA = "extra"
    NOT_FINITE = "not finite"
    UNSUPPORTED = "not supported"  # probably whole, but of a model that cannot be loaded

    def __str__(self) -> str:
        return self.value


GOOD = (State.WHOLE, State.SOUND)
STATE_OF_IMPOSTOR = {  # by the result of `files.what_is`, which becomes the `detail`
    "an empty file": State.EMPTY,
    "an HTML page": State.WEB_PAGE,
    "an XML error body": State.ERROR_BODY,
    "a JSON error body": State.ERROR_BODY,
    "a Git LFS pointer": State.POINTER,
    "a run of zero bytes": State.UNWRITTEN,
}

ADVICE = {state: ADVICE_ON_IMPOSTOR[kind] for kind, state in STATE_OF_IMPOSTOR.items()} | {
    State.MISSING: "fetch it",
    State.CUT_SHORT: "the download broke off, fetch that file again",
    State.LONGER: "something was written after or into it, delete it and fetch it again",
    State.DAMAGED: "its content is not what was published, fetch that file again",
    State.MISNAMED: "rename it, and if another file has that name, move that one away first",
    State.COPY: "its own content is missing, fetch it again",
    State.GROWING: "a download is still writing it, check again when it has finished",
    State.UNREADABLE: "make it readable, or fetch it again",
    State.REFUSED: "do not load it, fetch it again from its publisher",
    State.MISFIT: "it belongs to another model or was written wrongly, fetch the folder's files from one release",
    State.EXTRA: "move it out of the folder if it is not part of the release, or fetch the release's full checklist",
    State.NOT_FINITE: "the model cannot give sensible output, fetch it again, or look into the training that wrote it",
    State.UNSUPPORTED: "the download may be whole, but only text models of Llama 3 can be loaded, in a format that Meta ships",
}


@dataclass(frozen=True)
class FileReport:
    """The result for one file. Sizes are in bytes; `seconds` is the time spent hashing.

    Checksums are in hex, None if unknown or not computed.
    """

    name: str
    state: State
    size: int | None = None
    expected_size: int | None = None
    expected_sum: str | None = None
    found_sum: str | None = None
    detail: str = ""
    seconds: float | None = None

    @property
    def ok(self) -> bool:
        return self.state in GOOD

    @property
    def advice(self) -> str:
        return ADVICE.get(self.state, "")

    @property
    def bytes_per_second(self) -> float | None:
        return self.size / self.seconds if self.size and self.seconds else None

    def sentence(self) -> str:
        """What is wrong and what to do, as one sentence of the summary."""
        detail = f" ({self.detail})" if self.detail else ""
        difference = (self.expected_size or 0) - (self.size or 0)
        if self.state is State.CUT_SHORT and self.size is not None and difference > 0:
            return f"{printable(self.name)} is {human_bytes(difference)} short: {self.advice}"
        if self.state is State.LONGER and self.expected_size is not None and difference < 0:
            return f"{printable(self.name)} is {human_bytes(-difference)} too long: {self.advice}"
        if self.detail in STATE_OF_IMPOSTOR:
            return f"{printable(self.name)} is {self.detail}: {self.advice}"
        verb = "" if self.state is State.MISFIT else "is "
        return f"{printable(self.name)} {verb}{self.state}{detail}: {self.advice}"


@dataclass(frozen=True)
class Report:
    """The result for a folder. `problem` says why it could not be checked completely.

    `notes` are remarks, not faults.
    """

    folder: Path
    files: list[FileReport] = field(default_factory=list)
    problem: str | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def bad(self) -> list[FileReport]:
        """The files that are broken; one that is only not supported may be whole."""
        return [file for file in self.files if not file.ok and file.state is not State.UNSUPPORTED]

    @property
    def ok(self) -> bool:
        """Whether everything was checked and is whole."""
        return not self.bad and self.problem is None

    @property
    def exit_code(self) -> int:
        """0: whole; 1: a file is not whole; 2: no files, or not supported; 3: nothing to check against.

        With 3, no file is known to be wrong, but some have no checksum to compare with.
        """
        if any(file.name != CHECKLIST_NAME for file in self.bad):
            return 1
        if all(file.name == CHECKLIST_NAME for file in self.files):
            return 2
        if any(file.state is State.UNSUPPORTED for file in self.files):
            return 2
        return 0 if self.ok else 3

    def summary(self) -> str:
        """The result in one line."""
        total, bad = len(self.files), self.bad
        if not self.files:
            return f"{printable(str(self.folder))} could not be checked: {self.problem}"
        if not bad:
            word = "whole" if all(file.state is State.WHOLE for file in self.files) else "sound as far as could be checked"
            counted = f"all {total} files are {word}" if total > 1 else f"the only file is {word}"
            return counted if self.problem is None else f"{counted}; {self.problem}"
        shown = "; ".join(file.sentence() for file in bad[:3])
        more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
        problem = f"; {self.problem}" if self.problem else ""
        word = "sound" if any(file.state is State.SOUND for file in self.files) else "whole"
        return f"{total - len(bad)} of {total} files are {word}; {shown}{more}{problem}"

    def to_json(self) -> str:
        """The report as JSON: fields, ok, exit_code, summary; per file fields, ok, advice."""
        files = [asdict(file) | {"state": str(file.state), "ok": file.ok, "advice": file.advice} for file in self.files]
        head = {"folder": str(self.folder), "ok": self.ok, "exit_code": self.exit_code, "summary": self.summary()}
        tail = {"problem": self.problem, "notes": self.notes, "seconds": round(self.seconds, 3), "files": files}
        return json.dumps(head | tail, indent=2)
