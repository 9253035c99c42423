"""`llama-ref chat`: a conversation at the terminal, or through a pipe."""

import contextlib
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from llama_ref.chat import ToolCall
from llama_ref.cli.shared.text_input import checked, readable
from llama_ref.cli.terminal import note
from llama_ref.cli.timing import Timing
from llama_ref.cli.views.guard import reasons
from llama_ref.decoding.stream import Stream
from llama_ref.errors import RequestError
from llama_ref.formatting import did_you_mean
from llama_ref.guard.gate import Gate
from llama_ref.parallel.job import Job, from_first
from llama_ref.session import Session

COMMANDS = ("/image", "/result", "/system", "/reset", "/save", "/load", "/exit", "/help")
HELP = """/image FILE   show an image with the next message (vision releases)
/result TEXT  give the result of a tool that the model called, once per call
/system TEXT  reset the conversation, with this system prompt (without TEXT: none)
/reset        reset the conversation, with the same system prompt
/save FILE    write the conversation to a JSON file
/load FILE    continue a saved conversation
/exit         leave (so does Ctrl-D)
Ctrl-C interrupts an answer. A line that ends in \\ continues on the next one."""
INTERRUPTED = "\n(/exit or Ctrl-D leaves)"


def chat(session: Session, options: dict, gate: Gate | None = None) -> None:
    """Read lines, answer them, follow /commands, until /exit or the end of input.

    Shows a prompt only at a terminal; through a pipe, only answers go to stdout. With several
    processes, rank 0 reads for all. `options` are those of `Llama.stream`. A `gate` holds back
    unsafe messages.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history for input()
        note("Type a message, or /help.")
    hinted = False
    images: list[str] = []  # for the next message
    results: list[str] = []  # of the last answer's calls
    for line in _lines("> " if interactive else "", session.llama.job):
        try:
            if not line.strip():
                continue
            if line.startswith("/"):
                if line.split()[0] == "/exit":
                    return
                if not _completes_results(session, line, results):
                    note(_command(session, line, images, results))
                    continue
                if gate is not None:
                    raise RequestError("a tool's results cannot be judged: start again without --guard")
                hint = _answer(session, session.say_results(*_used_up(results), **options), interactive)
            else:
                results.clear()
                shown = _used_up(images)
                if gate is None:
                    hint = _answer(session, session.say(line, shown, **options), interactive)
                else:
                    hint = _judged_answer(gate, line, shown, options, interactive)
            if hint and not hinted:
                note(hint)
            hinted = hinted or bool(hint)
        except RequestError as error:
            note(str(error))
        except KeyboardInterrupt:  # before or after an answer
            if not interactive:
                raise
            note(INTERRUPTED)


def _lines(prompt: str, job: Job) -> Iterator[str]:
    """Yield lines of input; a backslash at the end joins the next one.

    At a prompt, Ctrl-C discards the line, and a line that is not text is discarded too. Without a
    prompt, input comes through a pipe, and both end the program.
    """
    typed = ""
    while True:
        try:
            typed += from_first(job, partial(_line, "… " if typed and prompt else prompt))
            if typed.endswith("\\"):
                typed = typed[:-1] + "\n"
                continue
        except EOFError:
            if prompt:
                note("")
            if typed:
                yield typed
            return
        except KeyboardInterrupt:
            if not prompt:
                raise
            note(INTERRUPTED)
            typed = ""
            continue
        except RequestError as error:  # the line is not text
            if not prompt:
                raise
            note(str(error))
            typed = ""
            continue
        line, typed = typed, ""
        yield line


def _line(prompt: str) -> str:
    """Read one line of input. Raises EOFError, or RequestError for a line that is not text."""
    with readable():
        return checked(input(prompt)).removesuffix("\r")  # Windows ends lines with \r\n


def _used_up(items: list[str]) -> list[str]:
    """Empty a list and return its items, so that even a rejected message uses them up."""
    taken, items[:] = list(items), []
    return taken


def _answer(session: Session, stream: Stream, interactive: bool) -> str | None:
    """Print an answer, its speed and its tool calls; return a hint if other programs slowed it down."""
    timing = Timing(stream)
    try:
        for piece in timing:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        timing.stream.close()
        if not interactive:  # nobody is there to type the next turn
            raise
    print(flush=True)
    note(str(timing))
    for call in session.tool_calls:
        note(call_line(call))
    return timing.hint(session.llama.device)


def _judged_answer(gate: Gate, text: str, images: list[str], options: dict, interactive: bool) -> str | None:
    """Like `_answer`, but judge the question before asking it, and the answer before showing it."""
    try:
        verdict = gate.question(text, images)
        if not verdict.is_safe:
            note(f"question held back: {reasons(verdict)}")
            return None
        timing = Timing(gate.session.say(text, images, **options))
        judged = gate.answer(timing)
    except KeyboardInterrupt:
        if not interactive:
            raise
        note("\n[interrupted, this turn is discarded]")
        return None
    if judged is None or judged.is_safe:
        print(timing.stream.text, flush=True)
    else:
        note(f"answer held back: {reasons(judged)}")
    note(str(timing))
    return timing.hint(gate.session.llama.device)


def call_line(call: ToolCall) -> str:
    """Format a tool call as one line."""
    arguments = call["arguments"]
    named = arguments.items() if isinstance(arguments, dict) else []
    shown = ", ".join(f"{name}={value!r}" for name, value in named)
    return f"[call: {call['tool_name']}({shown}){'' if call.get('is_offered', True) else ', which was not offered'}]"


def _completes_results(session: Session, line: str, results: list[str]) -> bool:
    """Record a /result; return whether all calls have one. Raises RequestError without calls."""
    command, _, rest = line.partition(" ")
    if command != "/result":
        return False
    n_calls = len(session.tool_calls)
    if not n_calls:
        raise RequestError("the last answer calls no tool, so /result has nothing to answer")
    results.append(rest)
    return len(results) == n_calls


def _as_pasted(path: str) -> str:
    """Return a path as typed; if no such file exists, without a terminal's quotes and backslashes."""
    try:
        return path if Path(path).expanduser().exists() else " ".join(shlex.split(path))
    except (OSError, ValueError, RuntimeError):  # invalid path, unclosed quote, unknown home
        return path


def _command(session: Session, line: str, images: list[str], results: list[str]) -> str:
    """Run a /command and return a line about it. Raises RequestError if it fails.

    `images` are for the next message; `results` are those given so far for the last answer's calls.
    """
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    match command:
        case "/help":
            return HELP
        case "/result":
            return f"{len(results)} of {len(session.tool_calls)} results"
        case "/image":
            path = _as_pasted(rest)
            if not path:
                raise RequestError("/image needs a file name")
            session.llama.load_tiles(path)
            images.append(path)
            return f"{len(images)} image{'s' if len(images) > 1 else ''} for the next message"
        case "/reset":
            images.clear()
            results.clear()
            session.reset(session.system)
            return "conversation reset"
        case "/system":
            images.clear()
            results.clear()
            session.reset(rest or None)
            return f"conversation reset, with{' this' if rest else 'out a'} system prompt"
        case "/save" | "/load" if not rest:
            raise RequestError(f"{command} needs a file name")
        case "/save":
            session.save(rest)
            return f"saved {len(session.dialog)} messages to {rest}"
        case "/load":
            images.clear()
            results.clear()
            session.load(rest)
            return f"loaded {len(session.dialog)} messages from {rest}"
    guess = did_you_mean(command, COMMANDS)
    raise RequestError(f"unknown command {command}{guess} (/help lists all)")
