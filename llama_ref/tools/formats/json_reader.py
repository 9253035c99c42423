"""Find calls written as JSON objects or function tags in a text, in time linear in its length."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llama_ref.formatting import short
from llama_ref.tools.answer import Call

DECODER = json.JSONDecoder(strict=False)  # accepts line breaks in strings
START = re.compile(r'<function=(?P<tag>[^<>\n]+)>\s*|\[\s*(?=\{\s*")|\{\s*(?=")')
CLOSING_TAG = re.compile(r"\s*</function>")
MOST_NESTED = 100  # nesting depth of objects and lists in a call
MOST_FAILURES = 100  # failed starts of a call, after which the rest is taken as text


@dataclass(frozen=True)
class Found:
    """A part of a text that holds calls, or an invalid call with the reason in `problem`."""

    start: int
    end: int
    calls: tuple[Call, ...] = ()
    problem: str | None = None


def find_calls(text: str) -> Iterator[Found]:
    """Every part of a text that holds calls or looks like a call, in order."""
    position = failures = 0
    while failures < MOST_FAILURES and (start := START.search(text, position)):
        found = _tagged(text, start) if start["tag"] else _bare(text, start)
        failures += not found.calls and (found.problem is not None or found.end <= start.end())
        if found.calls or found.problem:
            yield found
        position = max(found.end, start.start() + 1)


def _tagged(text: str, start: re.Match[str]) -> Found:
    """Read `<function=name>{…}</function>`; the end tag may be missing."""
    try:
        arguments, end = DECODER.raw_decode(text, start.end())
        call = _checked(start["tag"].strip(), arguments)
    except (ValueError, RecursionError) as error:
        return Found(start.start(), start.end(), problem=f"{start[0][:40].strip()}: {_reason(error)}")
    closing = CLOSING_TAG.match(text, end)
    return Found(start.start(), closing.end() if closing else end, (call,))


def _bare(text: str, start: re.Match[str]) -> Found:
    """Read an object with a name and arguments, or a list of such objects."""
    at = start.start()
    try:
        value, end = DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        is_list = text[at] == "["  # its first objects may be valid: look for them one by one
        return Found(at, at + 1 if is_list else error.pos, problem=None if is_list else f"invalid JSON: {_reason(error)}")
    except (ValueError, RecursionError) as error:  # a number with too many digits, or nested too deeply
        return Found(at, len(text), problem=f"invalid JSON: {_reason(error)}")
    try:
        calls = tuple(call for each in (value if isinstance(value, list) else [value]) if (call := _call(each)))
    except ValueError as error:
        return Found(at, end, problem=str(error))
    return Found(at, end, calls)


def _call(value: Any) -> Call | None:
    """The call in an object; None if it is another kind of object.

    Raises ValueError for an invalid call.
    """
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    name, arguments = value["name"], value.get("parameters", value.get("arguments"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, strict=False)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the arguments of {name!r} are a string that is not JSON: {_reason(error)}") from error
    return _checked(name, arguments)


def _checked(name: str, arguments: Any) -> Call:
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {name[:40]!r} are {short(arguments)}, expected an object")
    if depth_exceeds(arguments, MOST_NESTED):
        raise ValueError(f"the arguments of {name[:40]!r} are nested more than {MOST_NESTED} objects and lists deep")
    if not is_finite(arguments):  # Python's reader accepts NaN, and reads 1e999 as infinity
        raise ValueError(f"the arguments of {name[:40]!r} have a number that JSON cannot express: NaN, or one too large")
    return Call(name, arguments)


def depth_exceeds(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested deeper than `limit`."""
    level = [value]
    for _ in range(limit):
        level = [inner for each in level for inner in _inner(each)]
        if not level:
            return False
    return True


def is_finite(value: Any) -> bool:
    """Whether no number in a JSON value is NaN or infinite."""
    if isinstance(value, float):
        return math.isfinite(value)
    return all(map(is_finite, _inner(value)))


def _inner(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
