"""The format `[f(a='x'), g()]` of Llama 3.2 1B and 3B and 3.3, with tools in the system message."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama_ref.errors import RequestError
from llama_ref.formatting import short
from llama_ref.tools.formats.json_form import dumped
from llama_ref.tools.schema import Parameter, Tool, to_json

INSTRUCTION = """\
You are an expert in composing functions. You are given a question and a set of possible functions.
Based on the question, you will need to make one or more function/tool calls to achieve the purpose.
If none of the function can be used, point it out. If the given question lacks the parameters required by the function,
also point it out. You should only return the function call in tools call sections.

If you decide to invoke any of the function(s), you MUST put it in the format of \
[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]
You SHOULD NOT include any other text in the response."""
INTRODUCTION = "Here is a list of functions in JSON format that you can invoke."
NAME = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")


def describe(tools: Sequence[Tool], instruction: str = INSTRUCTION) -> str:
    """The part of the system message that offers tools. Raises RequestError for a name that Python cannot call."""
    for tool in tools:
        check_name(tool.name)
    return "\n\n".join([instruction, INTRODUCTION, to_json([_definition(tool) for tool in tools], indent=4)])


def _definition(tool: Tool) -> dict[str, Any]:
    properties = {each.name: _property(each) for each in tool.parameters}
    parameters = {"type": "dict", "required": tool.required, "properties": properties}
    return {"name": tool.name, "description": tool.description, "parameters": parameters}


def _property(parameter: Parameter) -> dict[str, Any]:
    return {"type": parameter.type, "description": parameter.description, **parameter.others()}


def write(calls: Sequence[tuple[str, Any]]) -> str:
    """Write calls, each a name and its arguments, as one list.

    Raises RequestError for what Python cannot express. Values are Python literals. An argument
    whose name is not an identifier is written as `**{"name": value}`.
    """
    return f"[{', '.join(_call(name, arguments) for name, arguments in calls)}]"


def _call(name: str, arguments: Any) -> str:
    check_name(name)
    if not isinstance(arguments, Mapping):
        raise RequestError(f"the arguments of the call of {name!r} are {short(arguments)}, expected an object")
    plain = json.loads(dumped(name, arguments, allow_nan=False))  # values that are not JSON have no Python literal either
    return f"{name}({', '.join(_argument(key, value) for key, value in plain.items())})"


def _argument(key: str, value: Any) -> str:
    return f"{key}={value!r}" if key.isidentifier() else f"**{{{key!r}: {value!r}}}"


def check_name(name: str) -> None:
    """Raise RequestError for a name that Python's syntax cannot call."""
    if not NAME.fullmatch(name):
        raise RequestError(f"Python cannot call {name!r}: use a name of letters, digits, _ and dots, or another tool_format")
