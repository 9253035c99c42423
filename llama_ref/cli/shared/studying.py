"""Shared by the study commands: loading a model, checking options, finding tokens."""

import json
from typing import TYPE_CHECKING, Annotated

from llama_ref.cli.parsing.flags import Flag
from llama_ref.cli.shared.options import Weights, load
from llama_ref.cli.shared.text_input import text_word
from llama_ref.errors import RequestError

if TYPE_CHECKING:
    from llama_ref.args import ModelArgs
    from llama_ref.generation import Llama
    from llama_ref.study.analyses.logit_lens import Lens
    from llama_ref.study.analyses.overview import Overview

Prompt = Annotated[str, Flag("text for the model to read", read=text_word)]
ImageFlag = Annotated[
    str | None, Flag("show this image before the text, or at its <|image|> with --special_tokens", metavar="FILE")
]
Out = Annotated[str | None, Flag("write an HTML page with tokens, layers, attention, attribution", metavar="FILE")]
TARGET_HELP = 'token with its leading space, such as " Paris"'


def open_to_study(name: str, options: Weights, **texts: str | None) -> "Llama":
    """Load a model in a single process.

    Raises RequestError for an empty text, or where torchrun started several processes.
    """
    from llama_ref.study.inputs import check_not_empty, check_one_process

    check_not_empty(**texts)
    check_one_process()
    return load(name, options)


def check_image(args: "ModelArgs", image: str) -> None:
    """Raise RequestError for a model without vision or an unreadable image, before a long load."""
    from llama_ref.chat import NO_IMAGES
    from llama_ref.images import load_tiles

    if args.vision_chunk_size is None:
        raise RequestError(f"--image is given, but {NO_IMAGES}")
    load_tiles(image, args.vision_chunk_size, args.vision_max_num_chunks)


def check_outputs(out: str | None = None, png: str | None = None) -> None:
    """Raise RequestError if a report or pictures cannot be written, before a long load.

    With a report, missing matplotlib is no reason to stop here: it is reported when drawing starts.
    """
    from llama_ref.study.figures import check_folder, check_pictures
    from llama_ref.study.report.writer import check_report

    if out is not None:
        check_report(out)
    if png is not None and out is not None:
        check_folder(png)
    elif png is not None:
        check_pictures(png)


def first_token(llama: "Llama", name: str, text: str, prompt: list[int], image: str | None = None) -> int:
    """Return the id of the first token of a text that may follow the prompt.

    Prints a note if there are more tokens, or if the model finds the text likelier with (or
    without) a leading space.
    """
    from llama_ref.cli.terminal import note
    from llama_ref.cli.views.study.shared import percent
    from llama_ref.study import inputs
    from llama_ref.study.spelling import likelier_spelling

    token, remark = inputs.first_token(llama.tokenizer, text, f"--{name}")
    if remark:
        note(remark)
    other = likelier_spelling(llama.model, llama.tokenizer, prompt, text, None if image is None else [image])
    if other:
        given, meant = (json.dumps(each, ensure_ascii=False) for each in (text, other.text))
        note(
            f"--{name} is {given}, whose first token has probability {percent(other.given_probability)}; that of"
            f" {meant} has {percent(other.probability)}: did you mean --{name} {meant}?"
        )
    return token


def overview_of(
    llama: "Llama",
    tokens: list[int],
    target: int | None,
    top: int,
    image: str | None = None,
    lens: "Lens | None" = None,
) -> "Overview":
    """Measure the contents of an HTML page, with a progress bar."""
    from llama_ref.cli.terminal import progress_bar
    from llama_ref.study.analyses.overview import overview

    with progress_bar("studying") as progress:
        return overview(
            llama.model,
            tokens,
            target=target,
            top=top,
            bos=llama.tokenizer.bos_id,
            ids=text_ids(llama),
            image=image,
            lens=lens,
            progress=progress,
        )


def write_page(seen: "Overview", llama: "Llama", name: str, out: str) -> None:
    """Write the HTML page and print its path; `name` is the model's on the command line."""
    from llama_ref.checkpoint.folder import find_folder
    from llama_ref.checkpoint.spelling import model_name
    from llama_ref.cli.terminal import note
    from llama_ref.study.report.writer import write_report

    write_report(seen, llama.tokenizer, out, model_name=model_name(find_folder(name).resolve()))
    note(f"wrote {out}: open it in a browser")


def text_ids(llama: "Llama") -> list[int]:
    """Return the ids of all tokens except special ones, to draw random tokens from."""
    return sorted(llama.tokenizer.vocabulary.ranks.values())
