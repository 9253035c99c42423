"""Parse a Python list of calls, `[f(a='x', n=-1), g.h(on=True)]`, without evaluating it.

`ast.parse` is not used, because it may exhaust the C stack, and rejects what models write:
arguments named like keywords (`from='Oslo'`), `true` and `null`, line breaks inside quotes.
"""

import re
from collections.abc import Callable
from typing import Any, TypeVar

from llama_ref.tools.answer import Call

T = TypeVar("T")
MOST_NESTED = 100  # nesting depth of brackets
TOKEN = re.compile(
    r"""\s*(?:
    (?P<text>[rRuU]?(?:'''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'''|\"\"\"[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*\"\"\"
        |'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*"))
    |(?P<number>[-+]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?(?!\w))
    |(?P<name>[^\W\d]\w*(?:\.[^\W\d]\w*)*)
    |(?P<sign>\*\*|[\[\](){}=,:])
    |(?P<end>\Z))""",
    re.VERBOSE | re.DOTALL,
)
CONSTANTS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None, "none": None}
ESCAPE = re.compile(r"\\(\n|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}|.)", re.DOTALL)
ESCAPED = {
    "n": "\n",
    "t": "\t",
    "r": "\r",
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "v": "\v",
    "\n": "",
    "\\": "\\",
    "'": "'",
    '"': '"',
}
LIKE_CALLS = re.compile(r"\s*\[\s*[^\W\d][\w.]*\s*\(")


class Malformed(Exception):
    """Text that is not a list of calls; the message says why."""


def looks_like_calls(text: str) -> bool:
    """Whether a text begins like a list of calls."""
    return LIKE_CALLS.match(text) is not None


def read_calls(text: str) -> list[Call]:
    """Parse a text that is a list of calls and nothing else.

    Raises Malformed for any other text.
    """
    reader = _Reader(text)
    calls = reader.items("[", "]", reader.call)
    reader.expect("end", "")
    return calls


class _Reader:
    """A recursive-descent parser with one token of lookahead."""

    def __init__(self, text: str) -> None:
        self._text, self._position, self._depth = text, 0, 0
        self._ended_in_comma = False  # whether the last closed brackets had a trailing comma
        self._next()

    def _next(self) -> None:
        found = TOKEN.match(self._text, self._position)
        if not found or found.lastgroup is None:
            raise Malformed(f"unexpected {self._text[self._position :].strip()[:20]!r} in a list of calls")
        self._start, self._position = found.start(found.lastgroup), found.end()
        self.kind, self.word = found.lastgroup, found[found.lastgroup]

    def expect(self, kind: str, word: str | None = None) -> str:
        """Consume the next token, which must have this kind and, if given, be this word."""
        if self.kind != kind or word not in (None, self.word):
            found = repr(self.word[:20]) if self.word else "the end"
            wanted = "the end" if kind == "end" else repr(word) if word else f"a {kind}"
            raise Malformed(f"expected {wanted}, found {found} in a list of calls")
        found = self.word
        if kind != "end":
            self._next()
        return found

    def at(self, sign: str) -> bool:
        return self.kind == "sign" and self.word == sign

    def items(self, opening: str, closing: str, read: Callable[[], T]) -> list[T]:
        """Read comma-separated items between brackets; a trailing comma is allowed."""
        self.expect("sign", opening)
        self._depth += 1
        if self._depth > MOST_NESTED:
            raise Malformed(f"brackets are nested more than {MOST_NESTED} deep")
        found, comma = [], False
        while not self.at(closing):
            found.append(read())
            if comma := not self.at(closing):
                self.expect("sign", ",")
        self.expect("sign", closing)
        self._depth, self._ended_in_comma = self._depth - 1, comma
        return found

    def call(self) -> Call:
        name = self.expect("name")
        arguments: dict[str, Any] = {}
        for given in self.items("(", ")", self._argument):
            for key, value in given:
                if key in arguments:
                    raise Malformed(f"{name} has the argument {key!r} twice")
                arguments[key] = value
        return Call(name, arguments)

    def _argument(self) -> list[tuple[str, Any]]:
        if self.at("**"):
            self._next()
            return self.items("{", "}", self._entry)
        if self.kind != "name":
            raise Malformed(f"the argument {self.word[:20]!r} has no name")
        key = self.expect("name")
        if not self.at("="):
            raise Malformed(f"the argument {key!r} has no name")
        self._next()
        return [(key, self._value())]

    def _entry(self) -> tuple[str, Any]:
        if self.kind != "text":
            raise Malformed(f"a dict's key is {self.word[:20]!r}, expected a quoted string")
        key = self._text_value()
        self.expect("sign", ":")
        return key, self._value()

    def _value(self) -> Any:
        if self.at("["):
            return self.items("[", "]", self._value)
        if self.at("{"):
            return dict(self.items("{", "}", self._entry))
        if self.at("("):
            return self._tuple()
        if self.kind == "text":
            return self._text_value()
        if self.kind == "number":
            return _number(self.expect("number"))
        if self.kind == "name" and self.word in CONSTANTS:
            return CONSTANTS[self.expect("name")]
        raise Malformed(
            f"{self.word[:20]!r} is not a value: expected a quoted string, a number, True, False, None, a list or a dict"
        )

    def _tuple(self) -> Any:
        """Read a tuple as a list, or a single value in parentheses as that value."""
        found = self.items("(", ")", self._value)
        return found if len(found) != 1 or self._ended_in_comma else found[0]

    def _text_value(self) -> str:
        """Read a string; adjacent string literals are concatenated."""
        parts = []
        while self.kind == "text":
            parts.append(_unquoted(self.expect("text")))
        return "".join(parts)


def _number(word: str) -> int | float:
    try:
        value = int(word) if word.lstrip("+-").replace("_", "").isdigit() else float(word)
    except ValueError as error:
        raise Malformed(f"{word[:20]!r} is not a number: {error}") from error
    if value in (float("inf"), float("-inf")):
        raise Malformed(f"{word[:20]!r} is too large")
    return value


def _unquoted(literal: str) -> str:
    prefix = literal[0] if literal[0] in "rRuU" else ""
    quoted = literal[len(prefix) :]
    n = 3 if quoted[:3] in ("'''", '"""') and len(quoted) >= 6 else 1
    inner = quoted[n:-n]
    return inner if prefix in ("r", "R") else ESCAPE.sub(_character, inner)


def _character(escape: re.Match[str]) -> str:
    code = escape[1]
    if code in ESCAPED:
        return ESCAPED[code]
    digits, base = (code, 8) if code[0] in "01234567" else (code[1:], 16)
    if not digits or int(digits, base) > 0x10FFFF:
        return escape[0]  # Python keeps unknown escapes unchanged
    return chr(int(digits, base))
