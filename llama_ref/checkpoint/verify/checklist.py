"""Read and write checksum lists in the format of `md5sum` and `sha256sum`."""

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from llama_ref.errors import CheckpointError
from llama_ref.files import read_small

CHECKLIST_NAME = "checklist.chk"
CHECKLIST_LIMIT_BYTES = 1 << 20  # thousands of files; Meta's longest list has 26
NAME_LIMIT_BYTES = 4096  # Linux's limit; resolving a path takes time quadratic in its length
ALGORITHM_OF_DIGITS = {32: "md5", 64: "sha256"}

_SUM = rb"(?P<sum>[0-9a-fA-F]{64}|[0-9a-fA-F]{32})"
_PLAIN = re.compile(rb"[ \t]*(?P<escaped>\\?)" + _SUM + rb"[ \t](?P<rest>.+)", re.DOTALL)
_TAGGED = re.compile(
    rb"[ \t]*(?P<escaped>\\?)(?P<tag>MD5|SHA256) ?\((?P<name>.*)\)[ \t]*=[ \t]*" + _SUM, re.DOTALL
)  # BSD's format; the last bracket ends the name
_BEGINNING = re.compile(rb"[ \t]*(\\?[0-9a-fA-F]{1,64}[ \t]*\*?|\\?(MD5|SHA256) ?\([^)]*\)?[ \t]*=?[ \t]*[0-9a-fA-F]*)")
_USUAL_NAMES = (  # every digit replaced by 0
    *("params.json", "tokenizer.model", "consolidated.00.pth", "added_tokens.json", "fp8_scales_0.pt"),
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.json", "chat_template.jinja"),
    *("preprocessor_config.json", "processor_config.json"),
    *("model-00000-of-00000.safetensors", "model.safetensors.index.json"),
)
_ESCAPE = re.compile(rb"\\[\\nr]")
_ESCAPES = {rb"\\": b"\\", rb"\n": b"\n", rb"\r": b"\r"}


@dataclass(frozen=True)
class Entry:
    """One line: the file `name` (relative to the folder) has the checksum `sum` (lowercase hex)."""

    name: str
    sum: str
    line: int

    @property
    def algorithm(self) -> str:
        return ALGORITHM_OF_DIGITS[len(self.sum)]


@dataclass(frozen=True)
class Checklist:
    """A parsed list: one entry per file, in order, and the numbers of invalid lines.

    `broken_off` is the incomplete last line of a list that is cut short.
    """

    path: Path
    entries: list[Entry]
    unread_lines: list[int]
    broken_off: str | None = None


def read_checklist(path: str | Path) -> Checklist:
    """Read MD5 or SHA-256 checksums in any format of `md5sum -c`, with GNU escapes and BSD tags.

    `unread_lines` are the numbers of the lines that md5sum would skip with a warning. If a file has
    both an MD5 and a SHA-256 checksum, the SHA-256 is used. A last line without a line break that
    is only the beginning of an entry becomes `broken_off`. Raises CheckpointError if no line is
    valid, an entry points outside the folder, two entries disagree, or the file is something else,
    such as a web page.
    """
    path = Path(path)
    data = read_small(path, CHECKLIST_LIMIT_BYTES, "a checklist of sums")
    parse = _LineParser()
    entries: dict[str, Entry] = {}
    unread = []
    *lines, rest = data.split(b"\n")
    broken_off = _broken_off(rest, path.parent)
    for number, line in enumerate([*lines, b"" if broken_off else rest], 1):
        line = line.removesuffix(b"\r")
        if not line or line.startswith(b"#"):
            continue
        found = parse(line)
        if found is None:
            unread.append(number)
            continue
        entry = Entry(_relative_name(found[0], path, number), found[1], number)
        entries[entry.name] = _merge_duplicate(entries.get(entry.name), entry, path)
    if not entries and not broken_off:
        raise CheckpointError(
            f"{path} has no line of the form `<32 or 64 hex digits>  <file name>`; it is not a checklist: fetch it again, "
            "or remove it and write one from files you trust"
        )
    return Checklist(path, list(entries.values()), unread, broken_off)


def format_entry(name: str, hex_sum: str) -> bytes:
    """The line that `md5sum` or `sha256sum` would print, with the `./` of Meta's lists."""
    raw = b"./" + os.fsencode(name)
    escaped = raw.replace(b"\\", rb"\\").replace(b"\n", rb"\n").replace(b"\r", rb"\r")
    return (b"\\" if escaped != raw else b"") + hex_sum.encode() + b"  " + escaped + b"\n"


class _LineParser:
    """Parses lines in order and remembers which plain format the list uses.

    Like GNU md5sum: the first plain line decides between `sum  name` / `sum *name` and BSD's
    reversed format `sum name`, so that a leading space in a name is not ambiguous.
    """

    def __init__(self) -> None:
        self.reversed: bool | None = None

    def __call__(self, line: bytes) -> tuple[bytes, str] | None:
        """(name, sum), or None if md5sum would call the line improperly formatted."""
        if b"\0" in line:
            return None  # md5sum's C strings end there
        if tagged := _TAGGED.fullmatch(line):
            name = None if (tagged["tag"] == b"MD5") != (len(tagged["sum"]) == 32) else tagged["name"]
            found = tagged
        elif plain := _PLAIN.fullmatch(line):
            name, found = self._plain_name(plain["rest"]), plain
        else:
            return None
        if name is not None and found["escaped"]:
            name = _unescaped(name)
        return None if name is None else (name, found["sum"].decode().lower())

    def _plain_name(self, rest: bytes) -> bytes | None:
        if len(rest) == 1 or rest[:1] not in (b" ", b"*"):
            if self.reversed is False:
                return None
            self.reversed = True
            return rest
        if self.reversed:
            return rest
        self.reversed = False
        return rest[1:]


def _broken_off(rest: bytes, folder: Path) -> str | None:
    """The text after the last line break, if it is only the beginning of an entry.

    A list may lack the last line break. A name is incomplete if there is no such file, and it is
    the beginning of the name of another file or of a file that checkpoints usually have.
    """
    found = _LineParser()(rest)
    if found is None:
        return os.fsdecode(rest) if _BEGINNING.fullmatch(rest) else None
    name = os.fsdecode(found[0]).removeprefix("./")
    if not name.strip(" *."):
        return os.fsdecode(rest)
    zeroed = re.sub(r"\d", "0", name)
    if os.path.lexists(folder / name) or zeroed in _USUAL_NAMES or zeroed == "model.safetensors":
        return None
    begun = [usual for usual in _USUAL_NAMES if usual.startswith(zeroed)]
    begun += [path.name for path in folder.iterdir() if path.name.startswith(name)]
    return os.fsdecode(rest) if begun else None


def _unescaped(name: bytes) -> bytes | None:
    if b"\\" in _ESCAPE.sub(b"", name):
        return None
    return _ESCAPE.sub(lambda match: _ESCAPES[match[0]], name)


def _relative_name(raw: bytes, path: Path, line: int) -> str:
    """The name without `./`. Raises CheckpointError if outside the folder, empty or too long."""
    if len(raw) > NAME_LIMIT_BYTES:
        raise CheckpointError(
            f"{path}, line {line} has a name of {len(raw):,} bytes, more than {NAME_LIMIT_BYTES:,}, the longest path; "
            "fetch the list again"
        )
    name = os.fsdecode(raw)
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise CheckpointError(
            f"{path}, line {line} names {name!r}, which is outside the folder; a checkpoint's list names only its own files, "
            "so do not trust this one"
        )
    if not pure.parts:
        raise CheckpointError(f"{path}, line {line} names {name!r}, which is not a file; remove the line")
    return str(pure)


def _merge_duplicate(before: Entry | None, entry: Entry, path: Path) -> Entry:
    if before is None:
        return entry
    if before.algorithm != entry.algorithm:
        return before if before.algorithm == "sha256" else entry
    if before.sum != entry.sum:
        raise CheckpointError(
            f"{path} contradicts itself about {entry.name!r}: line {before.line} says {before.sum}, "
            f"line {entry.line} says {entry.sum}; fetch the list again"
        )
    return before
