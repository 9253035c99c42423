"""Parse a command line and call its command.

The syntax is that of Python Fire, which people know from Meta's scripts: `--top_p 0.9`,
`--top-p=0.9`, `--echo`, `--noecho`, an argument by position or by name. Where Fire would guess,
this module decides before it calls Fire: only declared short flags exist, a text is not parsed as a
Python literal, a switch takes the next word only if that is True or False, and a mistyped flag is
an error with a suggestion.
"""

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llama_ref.cli.interrupt import exit_on_interrupt
from llama_ref.cli.outcome import (
    EXIT_BAD,
    EXIT_MISUSE,
    configure_stdio,
    guarded,
    log_to_stderr,
    report_error,
)
from llama_ref.cli.parsing.flags import Command, Parameter, command
from llama_ref.errors import RequestError
from llama_ref.formatting import did_you_mean

__all__ = [  # what scripts need, in one place
    "EXIT_BAD",
    "EXIT_MISUSE",
    "command",
    "configure_stdio",
    "guarded",
    "report_error",
    "run",
]

HELP_FLAGS = ("--help", "-h", "-help")


def run(main: Command, argv: list[str] | None = None) -> int:
    """Run a script's only command with these arguments (default: those of the process).

    Returns the exit code: 0 success, 1 failure, 2 misuse, 130 interrupted, 141 the reader of the
    output closed the pipe. Errors that a user can do something about are one line on stderr; only
    bugs print a traceback.
    """
    if argv is None:
        exit_on_interrupt()
    words = sys.argv[1:] if argv is None else argv
    return run_guarded(lambda: run_command(main, words, Path(sys.argv[0]).name))


def run_guarded(action: Callable[[], int | None]) -> int:
    """Run an action with stdio, logging and errors set up; return the exit code (see `run`)."""
    from llama_ref.cli.terminal import is_first_process

    configure_stdio(silent=not is_first_process())
    with log_to_stderr():
        code = guarded(action)
        if "llama_ref.parallel.job" in sys.modules:  # else no job to end: do not import torch
            sys.modules["llama_ref.parallel.job"].end_process(code)
    return code


def run_command(chosen: Command, words: list[str], program: str) -> int | None:
    """Show a command's help, or call it; return its exit code. Raises RequestError for misuse."""
    from llama_ref.cli.parsing.help import command_help

    if wants_help(words):
        print(command_help(chosen, program))
        return 0
    try:
        return chosen.call(parse(chosen, words, program))
    except RequestError as error:
        name = str(error).partition(" is ")[0]
        if name in chosen.parameters and not chosen.parameters[name].positional:
            error.args = (f"--{error}",)  # the library's message names the argument, not the flag
        raise


def wants_help(words: list[str]) -> bool:
    """Whether a flag asks for help. Fire's form, `-- --help`, counts too."""
    before, after = _split_at_dashes(words)
    return any(word in HELP_FLAGS for word in before) or after in (["--help"], ["-h"])


def parse(chosen: Command, words: list[str], program: str) -> dict[str, Any]:
    """Parse words into values by parameter name, for the parameters given. Raises RequestError."""
    import fire  # only now: help does not need it
    from fire.decorators import SetParseFns

    found = _assign(chosen, words, program)

    def collect(**values: Any) -> dict[str, Any]:
        return values

    keyword = inspect.Parameter.KEYWORD_ONLY
    # inspect.signature reads this attribute, which the stubs of functions lack.
    collect.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, keyword, default=None) for name in found]
    )
    SetParseFns(**{name: chosen.parameters[name].read for name in found})(collect)
    line = [f"--{name}={word}" for name, word in found.items()]
    return fire.Fire(collect, command=line, name=program, serialize=lambda result: None)


def _split_at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    """Split words at the first `--`, after which no word is a flag."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def _assign(chosen: Command, words: list[str], program: str) -> dict[str, str]:
    """Assign every word to a parameter; return the words by parameter name. Raises RequestError."""
    before, loose = _split_at_dashes(words)
    found: dict[str, str] = {}
    texts: list[str] = []
    waiting = list(before)
    while waiting:
        word = waiting.pop(0)
        if not _is_flag(word):
            texts.append(word)
            continue
        flag, equals, value = word.partition("=")
        parameter, value_of_no = _find(chosen, flag, program)
        before_it = found.get(parameter.name)
        if equals and value_of_no is None:
            found[parameter.name] = parameter.joined(before_it, value)
        elif parameter.is_switch:
            if equals:
                raise RequestError(f"{flag} takes no value; write --{parameter.name}={value}")
            given = waiting.pop(0) if waiting and waiting[0] in ("True", "False") else "True"
            found[parameter.name] = value_of_no or given
        elif not waiting or _is_flag(waiting[0]):
            raise RequestError(f"{flag} needs a value: {_form(flag, parameter, waiting)}")
        else:
            found[parameter.name] = parameter.joined(before_it, waiting.pop(0))
    _assign_texts(chosen, texts + loose, found, program)
    return found


def _form(flag: str, parameter: Parameter, waiting: list[str]) -> str:
    """Show how to write a flag with a value."""
    form = f"{flag} {parameter.metavar}"
    if not waiting:
        return form
    return f"{form}, or {flag}={parameter.metavar} where the value starts with a dash"


def _assign_texts(chosen: Command, texts: list[str], found: dict[str, str], program: str) -> None:
    """Assign words that are not flags to the arguments, in order; check that nothing is missing.

    A last argument with `many` takes all remaining words.
    """
    arguments = [each for each in chosen.parameters.values() if each.positional]
    free = [each for each in arguments if each.name not in found]
    if free and free[-1].flag.many:
        own = len(free) - 1
        texts = [*texts[:own], *([json.dumps(texts[own:])] if texts[own:] else [])]
    if len(texts) > len(free):
        hint = "; put a text of several words in quotes" if arguments else ""
        hint = "; flags go before --" if _is_flag(texts[len(free)]) else hint
        raise RequestError(f"unexpected argument {texts[len(free)]!r:.60}{hint}{_see(program)}")
    found |= {each.name: text for each, text in zip(free, texts, strict=False)}
    for each in chosen.parameters.values():
        if each.is_required and each.name not in found:
            form = each.label if each.positional else f"{each.label} {each.metavar}"
            what = each.flag.help.partition(" (")[0]
            raise RequestError(f"missing {form}{what and f', {what}'}{_see(program)}")


def _is_flag(word: str) -> bool:
    """Whether a word is meant as a flag, perhaps a mistyped one: one or two dashes and a name.

    "-5", "- item" and "--- title" are texts, and so is a word with a space before any "=".
    """
    name = word.partition("=")[0]
    return re.fullmatch(r"--?[A-Za-z][\w-]*", name) is not None


def _find(chosen: Command, flag: str, program: str) -> tuple[Parameter, str | None]:
    """Find a flag's parameter, and "False" if the flag denies it with "no", else None."""
    name = flag.lstrip("-").replace("-", "_")
    if name in chosen.shorts:
        return chosen.shorts[name], None
    if name in chosen.parameters:
        return chosen.parameters[name], None
    if name.startswith("no"):
        denied = chosen.parameters.get(name[2:].lstrip("_"))
        if denied is not None and denied.is_switch:
            return denied, "False"
    guess = did_you_mean(name, chosen.parameters, "--")
    if not guess and sum(each.positional for each in chosen.parameters.values()) > 1:  # a name and a text
        guess = "; put a text that begins with a dash last, after --"
    raise RequestError(f"unknown flag {flag}{guess}{_see(program)}")


def _see(program: str) -> str:
    return f" (see {program} --help)"


def run_program(words: list[str], program: str = "llama-ref") -> int | None:
    """Run the command that the first word names. Raises RequestError for misuse."""
    from llama_ref.cli import commands

    first, *rest = words or ["--help"]
    if first in ("--version", "-V"):
        from llama_ref.cli.parsing.help import version

        print(version())
        return 0
    if first in (*HELP_FLAGS, "help", "--"):
        asked = [word for word in rest if not word.startswith("-")]
        if asked:
            return run_program([asked[0], "--help"], program)
        _print_program_help(program)
        return 0
    names = commands.names()
    if first not in names:
        raise RequestError(_unknown_command(first, names, program))
    return run_command(commands.load(first), rest, f"{program} {first}")


def _print_program_help(program: str) -> None:
    from llama_ref.cli import commands
    from llama_ref.cli.parsing.help import program_help

    print(program_help({name: commands.load(name) for name in commands.names()}, program))


def _unknown_command(word: str, names: Iterable[str], program: str) -> str:
    if word.startswith("-"):
        guess = did_you_mean(word.lstrip("-"), ("help", "version"), "--")
        return f"unknown flag {word:.60}{guess or '; flags go after a command'}{_see(program)}"
    return f"unknown command {word!r:.60}{did_you_mean(word, tuple(names))}{_see(program)}"
