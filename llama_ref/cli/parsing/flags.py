"""Declare a command's arguments and flags by the annotations of one function.

    @command(Section.RUN)
    def complete(
        name: Annotated[str, Flag("checkpoint folder or release name")],
        *,
        echo: Annotated[bool, Flag("print the prompt first", short="e")] = False,
        sampling: Sampling,
    ) -> None:
        \"""Continue a text.\"""

A parameter before the `*` is an argument, given by position or by name; one after it is a flag.
Type and default are Python's own, a `Literal` lists choices. A parameter annotated with a dataclass
(`Sampling`) adds one flag per field, under its `heading`: commands share flags that way. Parsing (parser.py), help
(help.py) and shell completion (completion.py) all use these declarations.
"""

import ast
import contextlib
import inspect
import json
import sys
import textwrap
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cached_property
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from llama_ref.errors import RequestError
from llama_ref.formatting import did_you_mean

REQUIRED = inspect.Parameter.empty
SWITCH_VALUES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
NO_VALUE = ("none", "null")
TYPE_NAMES = {str: "TEXT", int: "INT", float: "NUMBER"}
EXPECTED = {int: "a whole number", float: "a number"}


class Section(Enum):
    """Headings of `llama-ref --help`, in the order in which they are shown."""

    INSPECT = "Inspect checkpoints"
    REWRITE = "Rewrite checkpoints"
    RUN = "Run a model"
    EVALUATE = "Evaluate a model"
    STUDY = "Study a model"
    OTHER = "Other"


@dataclass(frozen=True)
class Flag:
    """Help text and parsing options of an argument or flag, in its annotation.

    `unset` describes a default of None in the help. `aliases` are accepted besides the choices.
    `read` parses the word if the type alone does not say how. With `many`, a flag may be given
    several times, or the last argument takes several words, and `read` gets a JSON list of these
    words; otherwise the last occurrence of a flag wins.
    """

    help: str
    short: str | None = None
    metavar: str | None = None
    unset: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[str], Any] | None = None
    many: bool = False


@dataclass(frozen=True)
class Parameter:
    """An argument or a flag of a command. `kind` is its type without None and without choices."""

    name: str
    kind: Any
    choices: tuple[str, ...]
    optional: bool
    default: Any
    positional: bool
    group: str
    flag: Flag

    @property
    def is_switch(self) -> bool:
        return self.kind is bool

    @property
    def is_required(self) -> bool:
        return self.default is REQUIRED

    @property
    def label(self) -> str:
        """The name in messages: "NAME", "--top_p"."""
        return self.name.upper() if self.positional else f"--{self.name}"

    @property
    def metavar(self) -> str:
        """The placeholder for the value in the help."""
        return self.flag.metavar or "|".join(self.choices) or TYPE_NAMES.get(self.kind, "VALUE")

    def read(self, word: str) -> Any:
        """Turn a word of the command line into a value. Raises RequestError."""
        if self.flag.read is not None:
            return self.flag.read(word)
        if self.choices:
            return self._read_choice(word)
        if self.is_switch:
            return self._read_switch(word)
        return self._read_number(word) if self.kind in EXPECTED else word

    def joined(self, before: str | None, word: str) -> str:
        """Add a word to those `before` of the same flag: a JSON list if `many`, else the word."""
        return json.dumps([*json.loads(before or "[]"), word]) if self.flag.many else word

    def _read_choice(self, word: str) -> str:
        word = self.flag.aliases.get(word, word)
        if word in self.choices:
            return word
        *most, last = self.choices
        expected = f"{', '.join(most)} or {last}" if most else last
        guess = did_you_mean(word, self.choices) if most else ""
        raise RequestError(f"{self.label} is {word!r:.60}, expected {expected}{guess}")

    def _read_switch(self, word: str) -> bool:
        if word.lower() not in SWITCH_VALUES:
            raise RequestError(f"{self.label} is {word!r:.60}, expected true or false, or {self.label} alone for true")
        return SWITCH_VALUES[word.lower()]

    def _read_number(self, word: str) -> int | float | None:
        from fire.parser import DefaultParseValue  # Python's literals: 8, 1e-3, 1_000

        if self.optional and word.lower() in NO_VALUE:
            return None
        value = DefaultParseValue(word)
        if type(value) is int or (type(value) is float and self.kind is float):
            with contextlib.suppress(OverflowError):  # an integer too large for a float
                return self.kind(value)
        or_none = " or none" if self.optional else ""
        raise RequestError(f"{self.label} is {word!r:.60}, expected {EXPECTED[self.kind]}{or_none}")


@dataclass(frozen=True)
class Command:
    """A function that the command line can call, with its parameters as declared."""

    function: Callable[..., int | None]
    section: Section

    @property
    def summary(self) -> str:
        """The docstring's first paragraph, as one line without the period."""
        return " ".join(self._paragraphs[0].split()).removesuffix(".")

    @property
    def description(self) -> list[str]:
        """All other paragraphs of the docstring."""
        return self._paragraphs[1:]

    @property
    def _paragraphs(self) -> list[str]:
        return _docstring(self.function).split("\n\n")

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """Arguments and flags by name, including those of shared groups."""
        found = {}
        for name, (parameter, hint) in self._annotated.items():
            if is_dataclass(hint):
                own = _read_group(hint)
            else:
                positional = parameter.kind is not parameter.KEYWORD_ONLY
                own = [_parameter(name, hint, parameter.default, positional, "Flags")]
            for each in own:
                if each.name in found:
                    raise TypeError(f"{self.function.__name__} declares {each.name} twice")
                found[each.name] = each
        return found

    @cached_property
    def shorts(self) -> dict[str, Parameter]:
        """Parameters by their one-letter flags."""
        found = {each.flag.short: each for each in self.parameters.values() if each.flag.short}
        if len(found) < sum(each.flag.short is not None for each in self.parameters.values()):
            raise TypeError(f"{self.function.__name__} declares a short flag twice")
        return found

    def call(self, values: Mapping[str, Any]) -> int | None:
        """Call the function with values by parameter name; others get their defaults."""
        values = {n: values.get(n, each.default) for n, each in self.parameters.items()}
        arguments = {}
        for name, (_, hint) in self._annotated.items():
            if isinstance(hint, type) and is_dataclass(hint):
                arguments[name] = hint(**{each.name: values[each.name] for each in fields(hint)})
            else:
                arguments[name] = values[name]
        return self.function(**arguments)

    @cached_property
    def _annotated(self) -> dict[str, tuple[inspect.Parameter, Any]]:
        # On Python 3.10, get_type_hints(function) adds Optional where the default is None.
        bare = types.SimpleNamespace(__annotations__=self.function.__annotations__)
        hints = get_type_hints(bare, self.function.__globals__, include_extras=True)
        signature = inspect.signature(self.function)
        return {name: (each, hints[name]) for name, each in signature.parameters.items()}


def command(
    section: Section = Section.OTHER,
) -> Callable[[Callable[..., int | None]], Command]:
    """Decorate a function as a command; a script's `main` needs no section."""
    return lambda function: Command(function, section)


def _docstring(documented: Any) -> str:
    """Return a docstring; read from the source under `python -OO`, which strips it."""
    if sys.flags.optimize < 2:
        return inspect.getdoc(documented) or ""
    try:
        [node] = ast.parse(textwrap.dedent(inspect.getsource(documented))).body
    except OSError:  # no source, as in a frozen program
        return ""
    return ast.get_docstring(node) or "" if isinstance(node, ast.FunctionDef | ast.ClassDef) else ""


def _read_group(group: Any) -> list[Parameter]:
    """Read the flags of a dataclass; `heading` is theirs in the help."""
    hints = get_type_hints(group, include_extras=True)
    return [
        _parameter(
            each.name,
            hints[each.name],
            REQUIRED if each.default is MISSING else each.default,
            False,
            group.heading,
        )
        for each in fields(group)
    ]


def _parameter(name: str, hint: Any, default: Any, positional: bool, group: str) -> Parameter:
    flag = Flag("")
    if get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
        flag = next((note for note in notes if isinstance(note, Flag)), flag)
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
        optional = len(members) < len(get_args(hint))
        hint = members[0] if len(members) == 1 else Union[tuple(members)]  # noqa: UP007
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    kind = str if choices else hint
    if kind not in (str, int, float, bool) and flag.read is None:
        raise TypeError(f"{name}: {hint} needs Flag(read=...), which turns a word into a value")
    return Parameter(name, kind, choices, optional, default, positional, group, flag)
