"""What every command line here shares, the scripts' too: flags that explain themselves, errors in one line, exit codes."""

import errno
import functools
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fire
import fire.decorators

from llama_ref.errors import FolderNotFound, LlamaRefError, RequestError

fire.decorators.FIRE_METADATA = "_fire_metadata"  # or every command's help would offer it as a group of subcommands

EXIT_BAD, EXIT_MISUSE, EXIT_INTERRUPTED, EXIT_CLOSED_PIPE = 1, 2, 130, 141


@dataclass(frozen=True)
class Option:
    """A flag that several commands share."""

    name: str
    default: Any
    help: str


@dataclass(frozen=True)
class Call:
    """A command with its arguments; `--help` right after the command's name lists its flags."""

    # Not yet run: Fire shall first find out whether all words on the line make sense. Private: Fire offers public members as
    # words.
    _run: Callable[[], int | None]


def _strings(word: str) -> str | list[str]:
    """A text, or a JSON list of texts."""
    if word.startswith("["):
        try:
            return json.loads(word)
        except ValueError:
            pass
    return word


# Words that are text stay text: Fire would read a prompt of 42 as a number.
TEXT_NAMES = (
    *("name", "a", "b", "src", "dst", "to", "max_shard_size", "prompt", "system", "ckpt_dir", "tokenizer_path"),
    *("verify", "device", "dtype", "quantize", "speculate", "draft", "batch", "context", "against", "png"),
    *("target", "other", "clean", "corrupted", "over", "out", "matrices", "only", "stage"),
)
TEXTS = dict.fromkeys(TEXT_NAMES, str) | {"stop": _strings}


SHORT_SWITCHES = {"-q": "quick", "-e": "echo", "-f": "force", "-j": "json"}
SWITCH_VALUES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
SWITCHES = {"calibrate", "rehearse", "compile", "json", "echo", "all", "quick", "deep", "force", "chat"}


def command(*options: Option) -> Callable[[Callable[..., int | None]], Callable[..., Call]]:
    """Make a function a command that also takes `options`, which reach it as keywords."""

    def decorate(function: Callable[..., int | None]) -> Callable[..., Call]:
        @functools.wraps(function)
        def deferred(*args: Any, **kwargs: Any) -> Call:
            defaults = {option.name: option.default for option in options}
            return Call(functools.partial(function, *args, **(defaults | kwargs)))

        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        shared = [inspect.Parameter(o.name, inspect.Parameter.KEYWORD_ONLY, default=o.default) for o in options]
        deferred.__signature__ = inspect.Signature([*own, *shared])
        deferred.__doc__ = inspect.getdoc(function) + "".join(f"\n    {o.name}: {o.help}" for o in options)
        return fire.decorators.SetParseFns(**TEXTS)(deferred)

    return decorate


def run(component: Any, argv: list[str] | None = None, name: str | None = None) -> int:
    """Let Fire run a command, or one of several by name; the exit code.

    0 fine, 1 something is bad, 2 misuse, 130 interrupted, 141 the reader of the output went away. Errors that a user can do
    something about are a line on stderr; only bugs leave a traceback.
    """
    from llama_ref.cli.terminal import is_first_process

    settle_streams()
    if not is_first_process():
        logging.getLogger("llama_ref").setLevel(logging.ERROR)  # the first one warns for all
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  stays open as long as the process
    code = _run(component, argv, name)
    if "llama_ref.parallel.job" in sys.modules:  # else there is no job to end, and no torch to import for it
        sys.modules["llama_ref.parallel.job"].end_process(code)
    return code


def _run(component: Any, argv: list[str] | None, name: str | None) -> int:
    def call() -> int | None:
        words = _with_explicit_switches(sys.argv[1:] if argv is None else argv)
        found = fire.Fire(component, command=words, name=name, serialize=lambda result: None)
        return found._run() if isinstance(found, Call) else 0

    return guarded(call)


def guarded(action: Callable[[], int | None]) -> int:
    """Do something and give its exit code (None: 0), or that of what went wrong, told in a line; see `run`."""
    try:
        code = action() or 0
        sys.stdout.flush()
        return code
    except (RequestError, FolderNotFound) as error:
        return complain(error, EXIT_MISUSE)
    except LlamaRefError as error:
        return complain(error, EXIT_BAD)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would complain again
        return EXIT_CLOSED_PIPE
    except OSError as error:
        return complain(_known_os_error(error), EXIT_BAD)
    except RuntimeError as error:
        known = _known_failure(error)
        if known is None:
            raise
        return complain(known, EXIT_BAD)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED


def _known_os_error(error: OSError) -> Exception:
    """A full disk below standard output, in words; others name their file themselves."""
    if error.errno != errno.ENOSPC or error.filename is not None:
        return error
    return LlamaRefError(f"cannot write the output: {error.strerror}; send it elsewhere or free some space there")


def _known_failure(error: RuntimeError) -> LlamaRefError | None:
    """What torch's own error means to a user, where it is not a bug."""
    from llama_ref.device import is_out_of_memory
    from llama_ref.parallel.job import lost_a_process

    if is_out_of_memory(error):
        first_line = str(error).splitlines()[0]
        return LlamaRefError(
            f"out of memory ({first_line}): `llama-ref info` says how much a checkpoint needs; try --dtype bfloat16, a smaller "
            "--max_seq_len, --device cpu, or a smaller release"
        )
    if lost_a_process(error):
        return LlamaRefError("another process of this job has ended, so this one cannot go on")
    return None


def settle_streams() -> None:
    """Let no command end for a letter that cannot be shown or is no UTF-8, nor for a stream that the shell closed (`>&-`)."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115  stays open as long as the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _with_explicit_switches(words: list[str]) -> list[str]:
    """`--quick NAME` -> `--quick=True NAME`, `-q NAME` too: Fire would take the name for the switch's value.

    And `--force=false` -> `--force=False`: Fire would take the text for true. Raises RequestError for another value, and for a
    flag that wants a text and has none: Fire would make it "True".
    """
    followed_by = [*words, ""][1:]
    for word, after in zip(words, [*words, None][1:], strict=True):
        name = word.removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in TEXTS and (after is None or after.startswith("--") or after in SHORT_SWITCHES):
            raise RequestError(f"{word} needs a value behind it, as in {word} VALUE")
    return [_explicit_switch(word, after) for word, after in zip(words, followed_by, strict=True)]


def _explicit_switch(word: str, after: str) -> str:
    name, equals, value = word.partition("=")
    switch = SHORT_SWITCHES.get(name) or name.removeprefix("--")
    if not name.startswith("-") or switch not in SWITCHES:
        return word
    if not equals:
        return word if after in ("True", "False") else f"--{switch}=True"
    if value.lower() not in SWITCH_VALUES:
        raise RequestError(f"--{switch} is {value!r}, expected true or false, or --{switch} alone for true")
    return f"--{switch}={SWITCH_VALUES[value.lower()]}"


def complain(error: Exception, code: int) -> int:
    """Say what is wrong, once a job, and give the exit code back."""
    from llama_ref.formatting import printable

    if _is_first_to_complain():
        lines = f"llama-ref: {error}".split("\n")
        print(*map(printable, lines), sep="\n", file=sys.stderr)  # a file's name may hold a terminal's commands
    return code


def _is_first_to_complain() -> bool:
    """Whether no other of torchrun's processes has: most errors meet all of them, and one message is enough.

    Torchrun names a file for every process to report errors in, below a folder that this attempt at the job has to itself.
    """
    own_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not own_file:
        return True
    try:
        (Path(own_file).parent.parent / "complained").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass
    return True
