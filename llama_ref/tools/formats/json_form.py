"""The JSON format, Meta's default for Llama 3.1, with the tools in a user message."""

import json
from collections.abc import Sequence
from typing import Any

from llama_ref.errors import RequestError
from llama_ref.tools.schema import Parameter, Tool, to_json

INSTRUCTION = """\
Answer the user's question by making use of the following functions if needed.
If none of the function can be used, please say so.
Here is a list of functions in JSON format:"""
CLOSING = "Return function calls in JSON format."


def describe(tools: Sequence[Tool]) -> str:
    """The user message that offers tools."""
    return "\n".join([INSTRUCTION, *map(_definition, tools), "", CLOSING])


def _definition(tool: Tool) -> str:
    """A tool as Meta writes it: a list of properties, each an "object", `required` on one line."""
    properties = [{each.name: _property(each)} for each in tool.parameters]
    parameters = {"type": "object", "properties": properties, "required": []}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    text = to_json({"type": "function", "function": function}, indent=4)
    before, after = text.rsplit("[]", 1)  # the empty list of `required`, which comes last
    return before + to_json(tool.required) + after


def _property(parameter: Parameter) -> dict[str, Any]:
    return {"type": "object", "description": parameter.description, **parameter.others("default")}


def write(name: str, arguments: Any) -> str:
    """Write a call. Raises RequestError for arguments that JSON cannot express."""
    return dumped(name, {"type": "function", "name": name, "parameters": arguments})


def dumped(name: str, value: Any, *, allow_nan: bool = True) -> str:
    """Write a call's JSON in ASCII, as Meta's encoder does; `name` is for the error."""
    try:
        return json.dumps(value, allow_nan=allow_nan)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the arguments of the call of {name!r} cannot be written as JSON: {error}") from error
