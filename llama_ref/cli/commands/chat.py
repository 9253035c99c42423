"""`llama-ref chat`."""

from dataclasses import asdict
from typing import Annotated

from llama_ref.cli.flags import Flag, Section, command
from llama_ref.cli.options import Loading, Name, Sampling, build
from llama_ref.cli.text_input import Encoding, decode_stdin, text_word


@command(Section.RUN)
def chat(
    name: Name,
    *,
    system: Annotated[str | None, Flag("system prompt", short="s", unset="none", read=text_word)] = None,
    encoding: Encoding = None,
    sampling: Sampling,
    loading: Loading,
) -> None:
    """Chat with an instruct model.

    /help lists the commands inside the conversation. Through a pipe, each line is a turn.

      llama-ref chat Llama3.2-1B-Instruct --system "Answer in Korean."
    """
    from llama_ref.cli import chat as conversation
    from llama_ref.session import Session

    decode_stdin(encoding)
    conversation.chat(Session(build(name, sampling, loading), system), asdict(sampling))
