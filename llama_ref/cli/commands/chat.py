"""`llama-ref chat`."""

from dataclasses import asdict
from typing import Annotated

from llama_ref.cli.flags import Flag, Section, command
from llama_ref.cli.guarding import GuardVersion, load_guard
from llama_ref.cli.options import Loading, Name, Sampling, build
from llama_ref.cli.text_input import Encoding, decode_stdin, text_word
from llama_ref.errors import RequestError


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
    encoding: Encoding = None,
    sampling: Sampling,
    loading: Loading,
) -> None:
    """Chat with an instruct model.

    /help lists the commands inside the conversation. Through a pipe, each line is a turn.

    With --guard an answer is shown when all of it has been judged. What is held back does not stay in the
    conversation. The guard is loaded as the model is: the memory of both is needed.

      llama-ref chat Llama3.2-1B-Instruct --system "Answer in Korean."
      llama-ref chat Llama3.1-8B-Instruct --guard Llama-Guard-3-1B
    """
    from llama_ref.cli import chat as conversation
    from llama_ref.generation import check_stream_options
    from llama_ref.guard.gate import Gate
    from llama_ref.session import Session

    if guard_version and not guard:
        raise RequestError("--guard_version is given without --guard, expected both or neither")
    check_stream_options(**asdict(sampling))  # before the guard is loaded
    decode_stdin(encoding)
    judge = guard and load_guard(guard, guard_version, loading)
    session = Session(build(name, sampling, loading), system)
    conversation.chat(session, asdict(sampling), Gate(judge, session) if judge else None)
