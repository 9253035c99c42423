"""Meta's built-in tools: calls such as `brave_search.call(query="…")`, and interpreter code."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama_ref.errors import RequestError
from llama_ref.formatting import short
from llama_ref.tools.answer import Call

CODE = "code_interpreter"
BUILTIN_ARGUMENT = {"brave_search": "query", "wolfram_alpha": "query", "photogen": "query", CODE: "code"}
QUERY_CALL = re.compile(r'[\s;,]*(brave_search|wolfram_alpha|photogen)\.call\(query="([^"\\]*(?:\\.[^"\\]*)*)"\)', re.DOTALL)
KNOWLEDGE_CUTOFF = "December 2023"  # the same in all of Meta's documents


def describe(builtins: Sequence[str], today: str | None = None) -> str:
    """The beginning of a system message: the environment, built-in tools and, with `today`, dates.

    The code interpreter is not listed: the line `Environment: ipython` turns it on.
    """
    queried = [name for name in builtins if name != CODE]
    environment = "Environment: ipython\n" + (f"Tools: {', '.join(queried)}" if queried else "")
    return f"{environment}\n{dates(today)}" if today else environment


def dates(today: str) -> str:
    """The two lines with the knowledge cutoff and today's date."""
    return f"Cutting Knowledge Date: {KNOWLEDGE_CUTOFF}\nToday Date: {today}"


def write(name: str, arguments: Any) -> str:
    """Write a built-in tool's call. Raises RequestError if its one argument is missing.

    Quotes and backslashes in a query are escaped; Meta's encoder does not escape them, and its
    parser does not accept quotes.
    """
    key = BUILTIN_ARGUMENT[name]
    value = arguments.get(key) if isinstance(arguments, Mapping) else None
    if not isinstance(value, str):
        raise RequestError(f'a call of {name} has the arguments {short(arguments)}, expected {{"{key}": "…"}}')
    if name == CODE:
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}.call(query="{escaped}")'


def read(text: str) -> tuple[list[Call], int]:
    """Read the calls at the beginning of a text; returns them and the end of the last one."""
    calls, end = [], 0
    while found := QUERY_CALL.match(text, end):
        calls.append(Call(found[1], {"query": re.sub(r'\\(["\\])', r"\1", found[2])}))
        end = found.end()
    return calls, end


def renamed(name: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a built-in tool that was called like a custom one.

    None if they cannot be used.
    Models give the single argument other names; like Meta's code, this takes the first argument.
    """
    value = next(iter(arguments.values()), None)
    return {BUILTIN_ARGUMENT[name]: value} if isinstance(value, str) else None
