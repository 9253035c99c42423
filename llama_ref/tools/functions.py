"""Make a tool from a Python function: its signature and docstring become the schema."""

import inspect
import json
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from llama_ref.errors import RequestError
from llama_ref.formatting import short
from llama_ref.tools.schema import Parameter, Tool

JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
LISTS, MAPPINGS = (list, Sequence), (dict, Mapping)
EXPECTED = "expected str, int, float, bool, list[…], dict, Literal[…], or one of these | None"
SPHINX = re.compile(r":param(?:\s+[^:\s]+)*?\s+(\w+):\s*(.*?)(?=\n\s*:\w|\n\s*\n|\Z)", re.DOTALL)
GOOGLE_SECTION = re.compile(r"^(?:Args|Arguments|Parameters):\n((?:[ \t]+\S.*\n?|[ \t]*\n)+)", re.MULTILINE)
GOOGLE_ENTRY = re.compile(r"^(\w+)(?:\s*\([^)]*\))?:\s*(.*(?:\n[ \t]+.*)*)", re.MULTILINE)
END_OF_SUMMARY = re.compile(r"^(?:Args|Arguments|Parameters|Returns|Raises|Yields|Examples?|Notes?):\s*$|^:\w+", re.MULTILINE)


def tool_from_function(function: Callable[..., Any]) -> Tool:
    """Make the tool whose calls `function(**arguments)` carries out.

    Its description is the docstring up to the first section. A parameter's description comes from
    `Annotated[type, "…"]`, from a section "Args:" (Google style) or from ":param name: …" (Sphinx
    style). A parameter with a default is not required. Raises RequestError for anything that a
    schema cannot express: a missing or unsupported type, `*args`, `**kwargs`, positional-only
    parameters, a default that is not JSON.
    """
    name = getattr(function, "__name__", "")
    if not name.isidentifier():
        raise RequestError(f"{short(function)} has no name for a model to call: define it with def, or give a JSON schema")
    try:
        signature, hints = inspect.signature(function), get_type_hints(function, include_extras=True)
    except (TypeError, ValueError, NameError) as error:
        raise RequestError(f"the signature of {name} cannot be read: {error}; give a JSON schema instead") from error
    docstring = inspect.getdoc(function) or ""
    described = _described(docstring)
    parameters = [
        _parameter(name, parameter, hints.get(parameter.name), described.get(parameter.name))
        for parameter in signature.parameters.values()
    ]
    return Tool(name, _joined(END_OF_SUMMARY.split(docstring)[0]), tuple(parameters))


def _parameter(function: str, parameter: inspect.Parameter, hint: Any, described: str | None) -> Parameter:
    where = f"parameter {parameter.name!r} of {function}"
    if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
        raise RequestError(f"{where} is {parameter.kind.description}: a call names its arguments, so this one cannot be given")
    if hint is None:
        raise RequestError(f"{where} has no type: annotate it, {EXPECTED}")
    schema = _schema(where, hint)
    if text := next(_notes(hint), described):
        schema["description"] = text
    if parameter.default not in (parameter.empty, None):
        schema["default"] = _json_default(where, parameter.default)
    return Parameter(parameter.name, schema, parameter.default is parameter.empty)


def _notes(hint: Any) -> Iterator[str]:
    """The strings in `Annotated`, also in a union: Python 3.10 makes one for a default of None."""
    inner = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()
    for each in (hint, *inner):
        yield from (note for note in getattr(each, "__metadata__", ()) if isinstance(note, str))


def _schema(where: str, hint: Any) -> dict[str, Any]:
    """A type's JSON schema."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _schema(where, inner[0])
    if origin in (Union, types.UnionType):
        inner = tuple(each for each in inner if each is not types.NoneType)
        if len(inner) == 1:
            return _schema(where, inner[0])
    elif origin is Literal:
        kinds = {JSON_TYPES.get(type(value)) for value in inner}
        if len(kinds) == 1 and None not in kinds:
            return {"type": kinds.pop(), "enum": list(inner)}
    elif origin in LISTS and len(inner) == 1:
        return {"type": "array", "items": _schema(where, inner[0])}
    elif origin in MAPPINGS and inner[0] is str:
        values = {} if inner[1] is Any else {"additionalProperties": _schema(where, inner[1])}
        return {"type": "object", **values}
    elif hint in JSON_TYPES:
        return {"type": JSON_TYPES[hint]}
    raise RequestError(f"{where} has the type {_shown(hint)}, which a JSON schema cannot express: {EXPECTED}")


def _json_default(where: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the default {short(value)} of {where} cannot be written as JSON: {error}") from error


def _described(docstring: str) -> dict[str, str]:
    """The parameter descriptions in a docstring, by name."""
    found = {name: _joined(text) for name, text in SPHINX.findall(docstring)}
    for section in GOOGLE_SECTION.findall(docstring):
        found |= {name: _joined(text) for name, text in GOOGLE_ENTRY.findall(inspect.cleandoc("\n" + section))}
    return found


def _joined(text: str) -> str:
    """Text on one line."""
    return " ".join(text.split())


def _shown(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
