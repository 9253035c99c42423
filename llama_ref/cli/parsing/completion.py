"""Shell completion scripts, generated from the commands' parameters.

The scripts are static: pressing Tab does not start Python.
"""

import re
import shlex
from collections.abc import Iterator, Mapping

from llama_ref.cli.parsing.flags import Command, Parameter

Commands = Mapping[str, Command]

PROGRAM_FLAGS = {"--help": "show help", "--version": "show versions"}
LIST_CHECKPOINTS = 'command ls "${LLAMA_MODELS_CONFIG_DIR:-$HOME/.llama}/checkpoints" 2>/dev/null'

BASH = """\
_llama_ref() {{
    local IFS=$' \\t\\n' words='' names='' name current=${{COMP_WORDS[COMP_CWORD]}}
    local previous=${{COMP_WORDS[COMP_CWORD-1]}}
    if [[ $current == = ]]; then
        current=''
    elif [[ $previous == = ]]; then
        previous=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    if (( COMP_CWORD == 1 )); then
        words='{commands}'
    else
        case "${{COMP_WORDS[1]}} $previous" in
{values}
        *)
            case "${{COMP_WORDS[1]}} $current" in
{flags}
{arguments}
            esac ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current")) || true
    while IFS= read -r name; do
        if [[ -n $name && $name == "$current"* ]]; then
            COMPREPLY+=("$(printf '%q' "$name")")
        fi
    done <<< "$names"
}}
complete -o bashdefault -o default -F _llama_ref llama-ref
"""

ZSH = """\
#compdef llama-ref
_llama_ref_checkpoints() {{
    local -a names
    names=(${{(f)"$({checkpoints})"}})
    compadd -a names
    _files
}}
_llama_ref() {{
    local -a commands
    commands=(
{commands}
    )
    if (( CURRENT == 2 )); then
        _describe command commands
        _arguments {program_flags}
        return
    fi
    local command=$words[2]
    shift words
    (( CURRENT-- ))
    case $command in
{flags}
    esac
}}
if [[ $funcstack[1] == _llama_ref ]]; then
    _llama_ref "$@"
else
    compdef _llama_ref llama-ref
fi
"""

FISH = """\
function __llama_ref_at
    set -l words (commandline -opc)
    test (count $words) -gt 1; and test $words[2] = $argv[1]
end
function __llama_ref_checkpoints
    set -l root ~/.llama
    set -q LLAMA_MODELS_CONFIG_DIR; and set root $LLAMA_MODELS_CONFIG_DIR
    command ls $root/checkpoints 2>/dev/null
end
function __llama_ref_first
    test (count (commandline -opc)) -eq 1
end
"""


def bash_script(commands: Commands) -> str:
    """Return the completion script for bash."""
    values, flags, arguments = [], [], []
    for name, command in commands.items():
        for each in command.parameters.values():
            if not each.positional and each.choices:
                patterns = "|".join(f'"{name} {form}"' for form in _forms(each))
                values.append(f"        {patterns}) words='{' '.join(each.choices)}' ;;")
        words = [form for form, _ in _long_flags(command)]
        flags.append(f"            \"{name} -\"*) words='{' '.join(words)}' ;;")
        first = _first_argument(command)
        if first is not None:
            # Not in `words`: compgen -W would execute $(…) in a folder's name.
            given = f"words='{' '.join(first.choices)}'" if first.choices else f"names=$({LIST_CHECKPOINTS})"
            arguments.append(f'            "{name} "*) {given} ;;')
    return BASH.format(
        commands=" ".join([*commands, *PROGRAM_FLAGS]),
        values="\n".join(values),
        flags="\n".join(flags),
        arguments="\n".join(arguments),
    )


def zsh_script(commands: Commands) -> str:
    """Return the completion script for zsh."""
    listed = [f"        {shlex.quote(f'{n}:{each.summary}')}" for n, each in commands.items()]
    cases = []
    for name, command in commands.items():
        specs = []
        for each in command.parameters.values():
            if each.positional:
                own = "_files" if each.flag.many else "_llama_ref_checkpoints"
                values = f"({' '.join(each.choices)})" if each.choices else own
                specs.append(f"{'*' if each.flag.many else ''}:{each.name}:{values}")
            else:
                specs += _zsh_flag(each)
        specs.append("--help[show help]")
        quoted = " \\\n            ".join(map(shlex.quote, specs))
        cases.append(f"    {name})\n        _arguments \\\n            {quoted} ;;")
    return ZSH.format(
        checkpoints=LIST_CHECKPOINTS,
        commands="\n".join(listed),
        program_flags=" ".join(shlex.quote(f"{n}[{text}]") for n, text in PROGRAM_FLAGS.items()),
        flags="\n".join(cases),
    )


def fish_script(commands: Commands) -> str:
    """Return the completion script for fish."""
    lines = [FISH]
    for flag, text in PROGRAM_FLAGS.items():
        lines.append(_fish("__llama_ref_first", f"-l {flag.lstrip('-')}", text))
    for name, command in commands.items():
        lines.append(_fish("__llama_ref_first", f"-f -a {name}", command.summary))
        at = f"__llama_ref_at {name}"
        for each in command.parameters.values():
            if each.positional:
                continue
            for flag, text in _named_flags(each):
                form = f"-l {flag.lstrip('-')}"
                if each.flag.short:
                    form += f" -s {each.flag.short}"
                if each.choices:
                    form += f" -x -a {shlex.quote(' '.join(each.choices))}"
                elif not each.is_switch:
                    form += " -r" if _takes_a_path(each) else " -x"
                lines.append(_fish(at, form, text))
        lines.append(_fish(at, "-l help -s h", "show help"))
        first = _first_argument(command)
        if first is not None:
            shown = " ".join(first.choices) or "(__llama_ref_checkpoints)"
            lines.append(_fish(at, f"{'-f ' if first.choices else ''}-a {shlex.quote(shown)}", ""))
    return "\n".join(lines) + "\n"


SCRIPTS = {"bash": bash_script, "zsh": zsh_script, "fish": fish_script}


def _first_argument(command: Command) -> Parameter | None:
    return next((each for each in command.parameters.values() if each.positional), None)


def _forms(parameter: Parameter) -> list[str]:
    """ "--quantize" and "-q"."""
    short = parameter.flag.short
    return [f"--{parameter.name}", *([f"-{short}"] if short else [])]


def _named_flags(parameter: Parameter) -> Iterator[tuple[str, str]]:
    """Yield a parameter's long flags with their help; "--no-x" unless a switch is off by default."""
    yield f"--{parameter.name}", parameter.flag.help
    if parameter.is_switch and parameter.default is not False:
        yield f"--no-{parameter.name}", f"not: {parameter.flag.help}"


def _long_flags(command: Command) -> Iterator[tuple[str, str]]:
    for each in command.parameters.values():
        if not each.positional:
            yield from _named_flags(each)
    yield "--help", "show help"


def _takes_a_path(parameter: Parameter) -> bool:
    return parameter.metavar in ("FILE", "FOLDER", "NAME")


def _zsh_flag(parameter: Parameter) -> Iterator[str]:
    for flag, text in _named_flags(parameter):
        text = re.sub(r"([\[\]:\\])", r"\\\1", text)
        if parameter.is_switch:
            value, equals = "", ""
        else:
            shown = f"({' '.join(parameter.choices)})" if parameter.choices else ""
            shown = shown or ("_files" if _takes_a_path(parameter) else " ")
            value, equals = f":{parameter.name}:{shown}", "="
        yield f"{flag}{equals}[{text}]{value}"
        if parameter.flag.short and flag == f"--{parameter.name}":
            yield f"-{parameter.flag.short}[{text}]{value}"


def _fish(condition: str, form: str, text: str) -> str:
    description = f" -d {_fish_quoted(text)}" if text else ""
    return f"complete -c llama-ref -n {_fish_quoted(condition)} {form}{description}"


def _fish_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
