"""`llama-ref complete`."""

import sys
from dataclasses import asdict
from typing import Annotated

from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.options import Images, Loading, Name, Sampling, SpecialTokens, build, check_images
from llama_ref.cli.shared.steering import Steer, parse, steering
from llama_ref.cli.shared.text_input import Encoding, read_stdin, text_word
from llama_ref.errors import RequestError

EXAMPLE = 'llama-ref complete NAME "Once upon a time"'


@command(Section.RUN)
def complete(
    name: Name,
    prompt: Annotated[str | None, Flag("text to continue", unset="standard input", read=text_word)] = None,
    *,
    image: Images = (),
    echo: Annotated[bool, Flag("print the prompt first", short="e")] = False,
    special_tokens: SpecialTokens = False,
    steer: Steer = None,
    encoding: Encoding = None,
    sampling: Sampling,
    loading: Loading,
) -> None:
    """Continue a text, printing tokens as they are generated.

    The text goes to standard output, the speed to standard error.

      llama-ref complete Llama3.2-1B "Once upon a time" --max_gen_len 64
      llama-ref complete Llama3.2-1B --temperature 0 < prompt.txt
      llama-ref complete Llama3.2-11B-Vision "This is a photo of" --image photo.jpg
    """
    from llama_ref.cli.terminal import is_first_process, note
    from llama_ref.cli.timing import Timing
    from llama_ref.parallel.job import from_first

    if prompt is None and is_first_process():  # torchrun's processes share one standard input
        prompt = _read_prompt(encoding)
    check_images(image)
    if steer is not None:
        parse(steer)  # before a long load
    llama = build(name, sampling, loading)
    text = from_first(llama.job, lambda: prompt or "")
    timing = Timing(llama.stream(text, images=image, special_tokens=special_tokens, **asdict(sampling)))
    if echo:
        print(text, end="", flush=True)
    with steering(llama, steer):
        for piece in timing:
            print(piece, end="", flush=True)
    print(flush=True)
    note(str(timing))
    if hint := timing.hint(llama.device):
        note(hint)


def _read_prompt(encoding: str | None) -> str:
    if sys.stdin.isatty():
        raise RequestError(f"missing PROMPT: {EXAMPLE}")
    prompt = read_stdin(encoding).removesuffix("\n").removesuffix("\r")  # the newline that `echo` adds
    if not prompt:
        raise RequestError(f"missing PROMPT, and standard input is empty: {EXAMPLE}")
    return prompt
