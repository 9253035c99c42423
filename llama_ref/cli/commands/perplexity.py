"""`llama-ref perplexity`."""

import json as json_module
from dataclasses import replace
from typing import Annotated, Literal

from llama_ref.cli.flags import Flag, Section, command
from llama_ref.cli.options import Json, Name, Scoring


@command(Section.EVALUATE)
def perplexity(
    name: Name,
    file: Annotated[list[str], Flag("text in UTF-8 to score; may be several", read=json_module.loads, many=True)],
    *,
    convention: Annotated[
        Literal["hf", "llama.cpp"],
        Flag("which tokens are scored: as in Hugging Face's guide (overlapping windows), or as by llama.cpp"),
    ] = "hf",
    context: Annotated[int | None, Flag("tokens of a window", unset="2048; 512 for llama.cpp")] = None,
    stride: Annotated[int | None, Flag("tokens between the beginnings of windows", unset="512")] = None,
    against: Annotated[
        str | None,
        Flag("also measure these: other checkpoints, or int8, int4, int4:group=N for NAME rounded so", metavar="NAME,..."),
    ] = None,
    json: Json = False,
    loading: Scoring,
) -> None:
    """Measure how well a model predicts texts: perplexity, bits per byte.

    Perplexities compare only within one tokenizer, convention, window and stride; bits per byte
    also between tokenizers. Lower is better.

      llama-ref perplexity Llama3.2-1B book.txt --against int8,int4
    """
    from llama_ref.cli.options import load
    from llama_ref.cli.terminal import progress_bar
    from llama_ref.cli.views.perplexity import Measured, print_perplexities
    from llama_ref.evaluation import perplexity as measuring
    from llama_ref.evaluation.candidates import candidates, shortest_context
    from llama_ref.evaluation.texts import read_texts
    from llama_ref.evaluation.windows import Cut
    from llama_ref.formatting import dtype_name

    texts = read_texts(file)
    models = candidates(name, loading.quantize, against)
    cut = Cut.parse(convention, context, stride, shortest_context(models))
    found: list[Measured] = []
    for model in models:
        llama = load(model.name, replace(loading, quantize=model.quantize))
        for text in texts:  # before the first is scored, which takes long
            measuring.windows_of(llama, text, cut)
        for text in texts:
            with progress_bar("scoring") as progress:
                figures = measuring.perplexity(llama, text, cut, progress)
            found.append(Measured(model.label, dtype_name(llama.dtype), llama.tokenizer.bos_id, text, figures))
        del llama  # before the next one is loaded
    print_perplexities(found, cut, as_json=json)
