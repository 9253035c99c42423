"""`llama-ref perplexity`."""

import json as json_module
from dataclasses import replace
from typing import Annotated, Literal

from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.options import Json, Name, Scoring


@command(Section.EVALUATE)
def perplexity(
    name: Name,
    file: Annotated[list[str], Flag("UTF-8 text file to score; several may be given", read=json_module.loads, many=True)],
    *,
    convention: Annotated[
        Literal["hf", "llama.cpp"],
        Flag("which tokens are scored: as in Hugging Face's guide (overlapping windows), or as in llama.cpp"),
    ] = "hf",
    context: Annotated[int | None, Flag("tokens per window", unset="2048; 512 for llama.cpp")] = None,
    stride: Annotated[int | None, Flag("tokens from the start of one window to the start of the next", unset="512")] = None,
    against: Annotated[
        str | None,
        Flag("also measure other checkpoints, or NAME quantized to int8, int4 or int4:group=N", metavar="NAME,..."),
    ] = None,
    json: Json = False,
    loading: Scoring,
) -> None:
    """Measure how well a model predicts texts: perplexity, bits per byte.

    Perplexities are comparable only with the same tokenizer, convention, window and stride; bits
    per byte also across tokenizers. Lower is better.

      llama-ref perplexity Llama3.2-1B book.txt --against int8,int4
    """
    from llama_ref.cli.shared.options import load
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
        for text in texts:  # check all of them before scoring one, which takes long
            measuring.windows_of(llama, text, cut)
        for text in texts:
            with progress_bar("scoring") as progress:
                figures = measuring.perplexity(llama, text, cut, progress)
            found.append(Measured(model.label, dtype_name(llama.dtype), llama.tokenizer.bos_id, text, figures))
        del llama  # before the next one is loaded
    print_perplexities(found, cut, as_json=json)
