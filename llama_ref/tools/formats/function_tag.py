"""The format `<function=name>{…}</function>`, with the tools in a user message."""

import re
from collections.abc import Sequence
from typing import Any

from llama_ref.errors import RequestError
from llama_ref.tools.formats.json_form import dumped
from llama_ref.tools.schema import Parameter, Tool, to_json

INSTRUCTION = "You have access to the following functions:"
CLOSING = """\
Think very carefully before calling functions.
If you choose to call a function ONLY reply in the following format with no prefix or suffix:

<function=example_function_name>{"example_name": "example_value"}</function>

Reminder:
- If looking for real time information use relevant functions before falling back to brave_search
- Function calls MUST follow the specified format, start with <function= and end with </function>
- Required parameters MUST be specified
- Only call one function at a time
- Put the entire function call reply on one line"""
NAME = re.compile(r"[^<>\n]+")


def describe(tools: Sequence[Tool]) -> str:
    """The user message that offers tools. Raises RequestError for a name that a tag cannot hold."""
    for tool in tools:
        check_name(tool.name)
    return "\n\n".join([INSTRUCTION, *map(_definition, tools), CLOSING])


def _definition(tool: Tool) -> str:
    parameters = to_json({each.name: _property(each) for each in tool.parameters}, sort_keys=True)
    head = f'"name": {to_json(tool.name)}, "description": {to_json(tool.description)}'
    return f"Use the function '{tool.name}' to '{tool.description}':\n{{{head}, \"parameters\": {parameters}}}"


def _property(parameter: Parameter) -> dict[str, Any]:
    known = {"description": parameter.description, "param_type": parameter.type, "required": parameter.is_required}
    return known | parameter.others("default")


def write(name: str, arguments: Any) -> str:
    """Write a call. Raises RequestError for a name or arguments that cannot be written."""
    check_name(name)
    return f"<function={name}>{dumped(name, arguments)}</function>"


def check_name(name: str) -> None:
    """Raise RequestError for a name that a tag cannot hold."""
    if not NAME.fullmatch(name):
        raise RequestError(f"a function tag cannot hold the name {name!r}: leave out <, > and line breaks, or use json")
