"""The definition of a tool: its name, its description, and its parameters as JSON schemas."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_ref.errors import RequestError
from llama_ref.formatting import short

EXAMPLE = '{"name": "f", "description": "…", "parameters": {"type": "object", "properties": {…}, "required": […]}}'


@dataclass(frozen=True)
class Parameter:
    """One parameter. `schema` is its JSON schema: type, description, default, enum, items, …"""

    name: str
    schema: Mapping[str, Any]
    is_required: bool = True

    @property
    def type(self) -> Any:
        """The schema's type; "any" if it has none."""
        return self.schema.get("type", "any")

    @property
    def description(self) -> str:
        return self.schema.get("description") or ""

    def others(self, *known: str) -> dict[str, Any]:
        """The schema's other keys."""
        return {key: value for key, value in self.schema.items() if key not in ("type", "description", *known)}


@dataclass(frozen=True)
class Tool:
    """A custom tool. Raises RequestError for an invalid name, description or schema."""

    name: str
    description: str = ""
    parameters: tuple[Parameter, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise RequestError(f"a tool's name is {short(self.name)}, expected a non-empty string")
        if not isinstance(self.description, str):
            raise RequestError(f"the description of {self.name} is {short(self.description)}, expected a string")
        for parameter in self.parameters:
            _check_schema(self.name, parameter)

    @property
    def required(self) -> list[str]:
        """The names of the parameters that a call must give."""
        return [parameter.name for parameter in self.parameters if parameter.is_required]

    @classmethod
    def from_schema(cls, schema: Mapping[str, Any]) -> "Tool":
        """Make a tool from its JSON schema, alone or as `{"type": "function", "function": schema}`.

        `properties` may be a mapping, or a list of mappings as in Meta's documents.
        """
        inner = schema.get("function", schema)
        if not isinstance(inner, Mapping) or "name" not in inner:
            raise RequestError(f"a tool is {short(dict(schema))}, expected an object like {EXAMPLE}")
        name = inner["name"]
        parameters = inner.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            raise RequestError(f"the parameters of {short(name)} are {short(parameters)}, expected an object as in {EXAMPLE}")
        required = parameters.get("required") or []
        if (
            isinstance(required, str)
            or not isinstance(required, Sequence)
            or not all(isinstance(each, str) for each in required)
        ):
            raise RequestError(f"required of {short(name)} is {short(required)}, expected a list of parameter names")
        properties = _properties(name, parameters.get("properties") or {})
        if unknown := [each for each in required if each not in properties]:
            raise RequestError(f"{short(name)} requires {unknown[0]!r}, which is not among its properties")
        return cls(
            name,
            inner.get("description") or "",
            tuple(Parameter(key, value, key in required) for key, value in properties.items()),
        )


def to_json(value: Any, indent: int | None = None, *, sort_keys: bool = False) -> str:
    """JSON for a prompt, with non-ASCII letters kept rather than escaped."""
    return json.dumps(value, ensure_ascii=False, indent=indent, sort_keys=sort_keys)


def _properties(name: Any, properties: Any) -> dict[str, Any]:
    """Properties by name, from a mapping or a list of mappings."""
    parts = [properties] if isinstance(properties, Mapping) else properties
    if not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) for part in parts):
        raise RequestError(f"properties of {short(name)} are {short(properties)}, expected an object with a schema for each")
    return {key: value for part in parts for key, value in part.items()}


def _check_schema(tool: str, parameter: Parameter) -> None:
    where = f"parameter {parameter.name!r} of {tool}"
    if not isinstance(parameter.name, str) or not parameter.name:
        raise RequestError(f"a parameter of {tool} has the name {short(parameter.name)}, expected a string")
    if not isinstance(parameter.schema, Mapping):
        raise RequestError(f'{where} is {short(parameter.schema)}, expected an object like {{"type": "string", …}}')
    if not isinstance(parameter.description, str):
        raise RequestError(f"{where} has the description {short(parameter.description)}, expected a string")
    try:
        json.dumps(dict(parameter.schema), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{where} cannot be written as JSON: {error}") from error
