"""Format values for messages and tables: sizes, names, dtypes."""

import re
import reprlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch  # only as a type: commands that do not need torch import this module


def human_bytes(n: float) -> str:
    """1234567 -> "1.23 MB" (powers of ten, three digits)."""
    if n < 1000:
        return f"{n:.0f} byte{'' if n == 1 else 's'}"
    units = iter(("kB", "MB", "GB", "TB"))
    unit = next(units)
    while (n := n / 1000) >= 999.5:
        unit = next(units, unit)
    return f"{n:.3g} {unit}"


def printable(text: str) -> str:
    """A file name that is safe to print to a terminal: control characters and invalid bytes are escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text)


def escape_controls(text: str) -> str:
    """Escape control characters as in "\\x1b", so that text cannot send commands to a terminal.

    Newlines and tabs stay, and the joiners that emoji and Indic scripts need. Also escaped are
    characters that reorder the text shown (U+202A to U+202E, U+2066 to U+2069), and surrogates, to
    which Python decodes a file name's invalid bytes.
    """
    return text.translate(_ESCAPES)


_ESCAPED = (
    *(code for code in range(0x20) if chr(code) not in "\n\t"),
    *range(0x7F, 0xA0),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
    *range(0xD800, 0xE000),
)
_ESCAPES = {code: chr(code).encode("unicode_escape", "surrogatepass").decode() for code in _ESCAPED}


def hide_queries(text: str) -> str:
    """Text without the queries and signatures of links: they are like passwords."""
    return _SIGNED.sub(r"\1…", _QUERY.sub(r"\1…", text))


_QUERY = re.compile(r"(https?:[^\s?'\"]*\?)[^\s'\"]+", re.IGNORECASE)
_SIGNED = re.compile(r"((?:Policy|Signature|Key-Pair-Id)=)[^\s'\"&]+")


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Give "; did you mean x?" for the known word nearest to this one, or "" if none is near."""
    import difflib  # only for a mistake: commands should start at once

    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def comma_list(names: Sequence[object], most: int) -> str:
    """Names for a message, separated by commas; with "…" after the first `most`, if there are more."""
    return ", ".join(map(str, names[:most])) + (", …" if len(names) > most else "")


def dtype_name(dtype: "torch.dtype") -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def span(seconds: float) -> str:
    """7500 -> "2 hours": a length of time in its largest unit, rounded down."""
    unit, size = next((each for each in _UNITS if seconds >= each[1]), _UNITS[-1])
    n = int(seconds // size)
    return f"{n:,} {unit}{'' if n == 1 else 's'}"


_UNITS = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))


def short(value: Any) -> str:
    """The repr of a value for a message, shortened if long or deep, with unprintable characters escaped."""
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxlist, _REPR.maxstring = 20, 60
