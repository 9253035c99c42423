"""`llama-ref chat`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.guarding import GuardVersion, load_guard
from llama_ref.cli.shared.options import Loading, Name, Sampling, build
from llama_ref.cli.shared.steering import Steer, parse, steering
from llama_ref.cli.shared.text_input import Encoding, decode_stdin, text_word
from llama_ref.errors import RequestError

if TYPE_CHECKING:
    from llama_ref.tools.toolset import ToolSet

TOOLS_LIMIT_BYTES = 1 << 20


@command(Section.RUN)
def chat(
    name: Name,
    *,
    system: Annotated[str | None, Flag("system prompt", short="s", unset="none", read=text_word)] = None,
    guard: Annotated[
        str | None,
        Flag("judge every question and answer with this Llama Guard, and hold back what is unsafe", metavar="NAME"),
    ] = None,
    guard_version: GuardVersion = None,
    tools: Annotated[str | None, Flag("JSON list of tools that the model may call", metavar="FILE", unset="none")] = None,
    steer: Steer = None,
    encoding: Encoding = None,
    sampling: Sampling,
    loading: Loading,
) -> None:
    """Chat with an instruct model.

    /help lists the commands inside the conversation. Through a pipe, each line is a turn.
    The --tools file is a list of JSON schemas and names of built-in tools. Calls are shown but
    never executed: type a tool's result after /result.

    With --guard, an answer is shown only after all of it has been judged. Messages that are held
    back do not stay in the conversation. The guard is loaded with the model's options; both need
    memory.

      llama-ref chat Llama3.2-1B-Instruct --system "Answer in Korean."
      llama-ref chat Llama3.2-3B-Instruct --tools tools.json
      llama-ref chat Llama3.1-8B-Instruct --guard Llama-Guard-3-1B
    """
    from llama_ref.cli import chat as conversation
    from llama_ref.generation import check_stream_options
    from llama_ref.guard.gate import Gate
    from llama_ref.session import Session

    if guard == "":  # an unset shell variable must not turn the guard off
        raise RequestError("--guard is empty, expected a checkpoint folder or a release name such as Llama-Guard-3-1B")
    if guard_version and guard is None:
        raise RequestError("--guard_version is given without --guard, expected both or neither")
    if tools is not None and guard is not None:
        raise RequestError("--tools and --guard are given, expected one of them: Llama Guard has no format for tool calls")
    check_stream_options(**asdict(sampling))  # before the guard is loaded
    decode_stdin(encoding)
    if steer is not None:
        parse(steer)  # before a long load
    offered = None if tools is None else _read_tools(tools)
    judge = None if guard is None else load_guard(guard, guard_version, loading)
    session = Session(build(name, sampling, loading), system, tools=offered)
    with steering(session.llama, steer):
        conversation.chat(session, asdict(sampling), None if judge is None else Gate(judge, session))


def _read_tools(file: str) -> "ToolSet":
    """Read the tools in a JSON file. Raises RequestError."""
    from llama_ref.files import named_in_request, read_json
    from llama_ref.tools.toolset import ToolSet

    if not file:
        raise RequestError("cannot read the tools in an empty name: --tools needs a JSON file")
    with named_in_request(file, "the tools") as path:
        tools = read_json(path, TOOLS_LIMIT_BYTES, "a list of tools")
    return ToolSet.from_tools(tools)
