"""Help texts, generated from the commands' parameters."""

import shutil
import textwrap
from collections.abc import Iterable, Mapping

from llama_ref.cli.parsing.flags import Command, Parameter, Section

WIDEST = 100  # columns: longer lines are hard to read
NARROWEST = 40
LONGEST_NAME = 26  # columns of a flag with its value; a longer one has its help on the next line


def program_help(commands: Mapping[str, Command], program: str) -> str:
    """Return the help that lists all commands with their summaries, by section."""
    lines = [
        "Llama 3 checkpoints as Meta ships them: check, convert, run and study them.",
        "",
        f"usage: {program} COMMAND [arguments] [flags]",
    ]
    column = 2 + max(map(len, commands)) + 2
    for section in Section:
        own = {name: each for name, each in commands.items() if each.section is section}
        if own:
            lines += ["", section.value]
            for name, each in own.items():
                lines += _entry(f"  {name}", each.summary, column)
    lines += [
        "",
        *_entry("  -V, --version", "show the version of this package and of PyTorch", 17),
        *_entry("  -h, --help", "show this text; after a command, its arguments and flags", 17),
        "",
        *_wrap(
            "NAME is a checkpoint folder, or a release such as Llama3.2-1B-Instruct under "
            "~/.llama/checkpoints (or $LLAMA_MODELS_CONFIG_DIR/checkpoints)."
        ),
    ]
    return "\n".join(lines)


def command_help(chosen: Command, program: str) -> str:
    """Return a command's help: summary, usage, arguments and flags, with choices and defaults."""
    parameters = list(chosen.parameters.values())
    arguments = [each for each in parameters if each.positional]
    flags = [each for each in parameters if not each.positional]
    lines = _wrap(f"{chosen.summary}.")
    for paragraph in chosen.description:
        indented = any(line.startswith(" ") for line in paragraph.split("\n"))
        lines += ["", *(paragraph.split("\n") if indented else _wrap(paragraph))]
    lines += ["", *_wrap(f"usage: {_usage(program, arguments, flags)}", hanging=7)]
    if arguments:
        lines += ["", "Arguments"]
        column = max(2 + len(each.label) for each in arguments) + 2
        for each in arguments:
            lines += _entry(f"  {each.label}", _explained(each), column)
    names = {each.name: _flag_form(each) for each in flags}
    names["help"] = "  -h, --help"
    column = min(max(map(len, names.values())), LONGEST_NAME) + 2
    groups = dict.fromkeys([*(each.group for each in flags), "Flags"])
    for group in sorted(groups, key=lambda group: group != "Flags"):
        lines += ["", group]
        for each in flags:
            if each.group == group:
                lines += _entry(names[each.name], _explained(each), column)
        if group == "Flags":
            lines += _entry(names["help"], "show this text", column)
    return "\n".join(lines)


def version() -> str:
    """Return the versions of this package, of PyTorch (without importing it) and of Python."""
    import platform
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    import llama_ref

    try:
        torch = f"torch {installed('torch')}"
    except PackageNotFoundError:
        torch = "no torch"
    return f"llama-ref {llama_ref.__version__} ({torch}, Python {platform.python_version()})"


def _usage(program: str, arguments: Iterable[Parameter], flags: Iterable[Parameter]) -> str:
    names = [f"{each.label} ..." if each.flag.many else each.label for each in arguments]
    words = [name if each.is_required else f"[{name}]" for name, each in zip(names, arguments, strict=True)]
    words += [f"{each.label} {each.metavar}" for each in flags if each.is_required]
    return " ".join([program, *words, "[flags]"])


def _flag_form(parameter: Parameter) -> str:
    """ "  -q, --quantize SCHEME"."""
    short = f"-{parameter.flag.short}, " if parameter.flag.short else "    "
    if not parameter.is_switch:
        return f"  {short}--{parameter.name} {parameter.metavar}"
    maybe = "[no-]" if parameter.default is not False else ""
    return f"  {short}--{maybe}{parameter.name}"


def _explained(parameter: Parameter) -> str:
    """A parameter's help, with its default if there is one to show."""
    default = parameter.default
    shown: str | None
    if parameter.is_required:
        shown = "" if parameter.positional else "required"
    elif default is None or default == ():
        shown = parameter.flag.unset and f"default: {parameter.flag.unset}"
    elif parameter.is_switch:
        shown = "default: on" if default else ""
    else:
        shown = f"default: {default}"
    return " ".join(filter(None, (parameter.flag.help, shown and f"({shown})")))


def _entry(name: str, text: str, column: int) -> list[str]:
    """A name and its text in two columns, the text wrapped; a long name gets its own line."""
    lines = _wrap(text, " " * column)
    if len(name) > column - 2:
        return [name, *lines]
    return [name.ljust(column) + lines[0].lstrip(), *lines[1:]] if lines else [name]


def _wrap(text: str, indent: str = "", hanging: int = 0) -> list[str]:
    width = max(NARROWEST, min(shutil.get_terminal_size().columns, WIDEST))
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent + " " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
