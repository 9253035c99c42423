"""Write an assistant's calls as a model would, in any of the formats."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from llama_ref.tools.formats import builtin, function_tag, json_form, python_list
from llama_ref.tools.formats.names import ToolFormat


def calls_text(calls: Sequence[tuple[str, Any]], tool_format: ToolFormat = "json") -> str:
    """Write calls, each a name and its arguments, one after another.

    The format python_list puts several in one list.
    Raises RequestError for a call that cannot be written in this format.
    """
    parts = []
    for is_builtin, group in groupby(calls, lambda call: call[0] in builtin.BUILTIN_ARGUMENT):
        some = list(group)
        if is_builtin:
            parts += [builtin.write(name, arguments) for name, arguments in some]
        elif tool_format == "python_list":
            parts.append(python_list.write(some))
        else:
            write = json_form.write if tool_format == "json" else function_tag.write
            parts += [write(name, arguments) for name, arguments in some]
    return "".join(parts)
