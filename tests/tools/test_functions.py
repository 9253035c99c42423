"""Python functions become tools by their signatures and docstrings."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Annotated, Any, Literal, Optional

import pytest

from llama_ref.errors import RequestError
from llama_ref.tools import ToolSet
from llama_ref.tools.formats import json_form, python_list
from llama_ref.tools.functions import tool_from_function


def forecast(
    city: str,
    days: int = 3,
    *,
    units: Literal["celsius", "fahrenheit"] = "celsius",
    hours: Annotated[list[int] | None, "which hours"] = None,
    detailed: bool = False,
    limits: Mapping[str, float] = {},
) -> str:
    """Weather of the next days,
    by day.

    Args:
        city: The name of the city,
            in English.
        days (int): How many: from 1 to 14.
        detailed: Whether to say more.

    Returns:
        city: not an argument.
    """
    return ""


def test_a_signature_and_a_docstring_become_a_schema():
    tool = tool_from_function(forecast)
    assert (tool.name, tool.description, tool.required) == ("forecast", "Weather of the next days, by day.", ["city"])
    assert {each.name: each.schema for each in tool.parameters} == {
        "city": {"type": "string", "description": "The name of the city, in English."},
        "days": {"type": "integer", "description": "How many: from 1 to 14.", "default": 3},
        "units": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
        "hours": {"type": "array", "items": {"type": "integer"}, "description": "which hours"},
        "detailed": {"type": "boolean", "description": "Whether to say more.", "default": False},
        "limits": {"type": "object", "additionalProperties": {"type": "number"}, "default": {}},
    }


def test_sphinxs_form_and_methods_are_read():
    class Desk:
        def order(self, item: str, n: "int", note: Optional[str] = None, options: dict[str, Any] | None = None) -> None:  # noqa: UP045
            """Order "things" from the Büro.

            :param item: what
               to order
            :param int n: how many
            :returns: nothing
            """

    tool = tool_from_function(Desk().order)
    assert tool.description == 'Order "things" from the Büro.' and tool.required == ["item", "n"]
    found = {each.name: (each.type, each.description) for each in tool.parameters}
    assert found == {
        "item": ("string", "what to order"),
        "n": ("integer", "how many"),
        "note": ("string", ""),
        "options": ("object", ""),
    }


def test_a_function_without_anything_is_a_tool():
    def ping():
        pass

    tool = tool_from_function(ping)
    assert (tool.description, tool.parameters) == ("", ())
    assert '"properties": {}' in python_list.describe([tool]) and '"properties": []' in json_form.describe([tool])


class Color(Enum):
    RED = 1


def untyped(x): ...
def many(*args: int): ...
def keywords(**options: int): ...
def positional(x: int, /): ...
def of_an_enum(x: Color): ...
def of_either(x: int | str): ...
def of_texts_and_numbers(x: Literal[1, "a"]): ...
def of_anything(x: Any): ...
def of_bytes(x: Sequence[bytes]): ...
def of_keys(x: dict[int, str]): ...
def of_functions(x: Callable[[], int]): ...
def with_an_object(x: str = object()): ...
def with_no_number(x: float = float("nan")): ...
def with_an_unknown_name(x: "Nowhere"): ...  # noqa: F821


def brave_search(query: str): ...


@pytest.mark.parametrize(
    "function, message",
    [
        (untyped, "parameter 'x' of untyped has no type: annotate it"),
        (many, "parameter 'args' of many is variadic positional"),
        (keywords, "parameter 'options' of keywords is variadic keyword"),
        (positional, "parameter 'x' of positional is positional-only"),
        (of_an_enum, "has the type Color, which a JSON schema cannot express"),
        (of_either, "has the type int | str"),
        (of_texts_and_numbers, "has the type typing.Literal[1, 'a']"),
        (of_anything, "has the type"),
        (of_bytes, "has the type bytes"),
        (of_keys, "has the type dict[int, str]"),
        (of_functions, "has the type"),
        (with_an_object, "of parameter 'x' of with_an_object cannot be written as JSON"),
        (with_no_number, "cannot be written as JSON"),
        (with_an_unknown_name, "the signature of with_an_unknown_name cannot be read"),
        (lambda x: x, "has no name for a model to call"),
        (functools.partial(forecast, "Oslo"), "has no name for a model to call"),
        (print, "print"),
        (int, "int"),
        (brave_search, "'brave_search' is a built-in tool"),
    ],
)
def test_what_cannot_be_expressed_is_refused(function, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        ToolSet.from_tools([function])
