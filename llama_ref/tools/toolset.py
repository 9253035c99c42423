"""The set of tools offered to a model, and how it is written into a dialog."""

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llama_ref.errors import RequestError
from llama_ref.formatting import short
from llama_ref.tools.formats import builtin, function_tag, json_form, python_list
from llama_ref.tools.formats.names import ToolFormat, check_format
from llama_ref.tools.functions import tool_from_function
from llama_ref.tools.schema import Tool

ToolLike = str | Callable[..., Any] | Mapping[str, Any] | Tool
Message = Mapping[str, Any]


@dataclass(frozen=True)
class ToolSet:
    """The tools that a prompt offers; create it with `ToolSet.from_tools`.

    `format`: how custom tools are written and called; None: the format that the model's release
    expects. `today`: the date to state in the prompt. `instruction`: replaces Meta's instruction in
    the format python_list.
    """

    builtins: tuple[str, ...] = ()
    own: tuple[Tool, ...] = ()
    format: ToolFormat | None = None
    today: str | None = None
    instruction: str | None = None

    @classmethod
    def from_tools(
        cls,
        tools: "ToolSet | Iterable[ToolLike]",
        tool_format: str | None = None,
        *,
        today: str | datetime.date | None = None,
        instruction: str | None = None,
    ) -> "ToolSet":
        """Make a set from Python functions, JSON schemas, `Tool`s and names of built-in tools.

        Raises RequestError for anything else, for duplicate names, and for a custom tool that has a
        built-in tool's name.
        """
        form = check_format(tool_format) if tool_format is not None else None
        date = f"{today:%d %B %Y}" if isinstance(today, datetime.date) else today
        if date is not None and not isinstance(date, str):
            raise RequestError(f"today is {short(today)}, expected a string like '21 September 2024' or a datetime.date")
        if isinstance(tools, ToolSet):
            return replace(
                tools,
                format=form or tools.format,
                today=date or tools.today,
                instruction=instruction or tools.instruction,
            )
        if isinstance(tools, str | Mapping) or not isinstance(tools, Iterable):
            raise RequestError(f"tools is {short(tools)}, expected a list of functions, JSON schemas and built-in tools' names")
        given = list(tools)
        builtins = [_builtin(tool) for tool in given if isinstance(tool, str)]
        own = [_own(tool) for tool in given if not isinstance(tool, str)]
        names = [*builtins, *(tool.name for tool in own)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise RequestError(f"two tools are named {twice[0]!r}: give each tool a name of its own")
        return cls(tuple(builtins), tuple(own), form, date, instruction)

    @property
    def names(self) -> list[str]:
        return [*self.builtins, *(tool.name for tool in self.own)]

    def write(self, dialog: Sequence[Message], tool_format: ToolFormat = "json") -> list[Message]:
        """A copy of a dialog with the tools in its system message, or in a user message after it.

        `tool_format` is used if the set has no `format`. The text of the dialog's own system
        message comes last, unchanged.
        """
        if not self.names and not self.today:
            return list(dialog)
        form = self.format or tool_format
        before, rest = _split(dialog)
        in_system = bool(self.own) and form == "python_list"
        parts = [self._header(form).rstrip("\n")]
        if in_system:
            parts.append(python_list.describe(self.own, self.instruction or python_list.INSTRUCTION))
        content = "\n\n".join(part for part in [*parts, before] if part)
        written: list[Message] = [{"role": "system", "content": content}] if content else []
        if self.own and not in_system:
            describe = json_form.describe if form == "json" else function_tag.describe
            written.append({"role": "user", "content": describe(self.own)})
        return [*written, *rest]

    def _header(self, form: ToolFormat) -> str:
        """The lines for environment, built-in tools and dates; python_list needs no environment."""
        if self.builtins or (self.own and form != "python_list"):
            return builtin.describe(self.builtins, self.today)
        return builtin.dates(self.today) if self.today else ""


def _split(dialog: Sequence[Message]) -> tuple[str, list[Message]]:
    """Split a dialog into its leading system message's text, or "", and the other messages."""
    first = dialog[0] if dialog else None
    if not isinstance(first, Mapping) or first.get("role") != "system":
        return "", list(dialog)
    content = first.get("content")
    items = content if isinstance(content, list | tuple) else [{"text": content}]
    given = [item.get("text") for item in items if isinstance(item, Mapping)]
    texts = [text for text in given if isinstance(text, str)]
    if len(texts) != len(items):
        raise RequestError(f"a system message's content is {short(content)}, expected text")
    return "".join(texts), list(dialog[1:])


def _builtin(name: str) -> str:
    if name not in builtin.BUILTIN_ARGUMENT:
        known = ", ".join(builtin.BUILTIN_ARGUMENT)
        raise RequestError(f"{name!r} is not a built-in tool ({known}): give your own tool as a function or a JSON schema")
    return name


def _own(given: Any) -> Tool:
    if isinstance(given, Tool):
        tool = given
    elif isinstance(given, Mapping):
        tool = Tool.from_schema(given)
    elif callable(given):
        tool = tool_from_function(given)
    else:
        raise RequestError(f"a tool is {short(given)}, expected a function, a JSON schema or the name of a built-in tool")
    if tool.name in builtin.BUILTIN_ARGUMENT:
        raise RequestError(f"{tool.name!r} is a built-in tool: give its name as a string, or rename your own tool")
    return tool
