"""`llama-ref ablate`."""

from typing import Annotated, Literal

from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.options import Json, Name, SpecialTokens, WholeModel
from llama_ref.cli.shared.studying import open_to_study
from llama_ref.cli.shared.text_input import text_word
from llama_ref.errors import RequestError


@command(Section.STUDY)
def ablate(
    name: Name,
    prompt: Annotated[str | None, Flag("text for the model to read", unset="none, with --texts", read=text_word)] = None,
    *,
    texts: Annotated[str | None, Flag("average over the texts of this file: one per line, or a .jsonl", metavar="FILE")] = None,
    over: Annotated[
        Literal["heads", "kv_groups", "attention", "feed_forward", "layers", "units"],
        Flag("parts to leave out, one at a time; for units, the 32 with the largest estimated effects"),
    ] = "heads",
    edit: Annotated[
        Literal["mean", "zero", "resample"],
        Flag("replace a part's output by its mean over the text, by zero, or by its value at random tokens"),
    ] = "mean",
    special_tokens: SpecialTokens = False,
    json: Json = False,
    loading: WholeModel,
) -> None:
    """Measure how much the loss changes without each part of a model.

    With --texts, changes are means over the texts, with standard errors.

      llama-ref ablate Llama3.2-1B "The capital of France is Paris." --over layers
    """
    from llama_ref.cli.terminal import progress_bar
    from llama_ref.cli.views.study.sweep import print_sweep
    from llama_ref.study.ablation.losses import texts_to_predict
    from llama_ref.study.ablation.resample import resample
    from llama_ref.study.ablation.sweep import sweep
    from llama_ref.study.datasets.prompt_file import read_prompts
    from llama_ref.study.inputs import prompt_tokens
    from llama_ref.study.patch import mean, zero

    if prompt is None and texts is None:
        raise RequestError("missing PROMPT or --texts: give the text that the model should read")
    if prompt is not None and texts is not None:
        raise RequestError("PROMPT and --texts are given, expected one of them")
    lines = None if texts is None else read_prompts(texts)
    prompts = {"prompt": prompt or ""} if lines is None else {f"text {i}": line for i, line in enumerate(lines, 1)}
    llama = open_to_study(name, loading, prompt=prompt)
    rows = [prompt_tokens(llama, text, what, special_tokens=special_tokens) for what, text in prompts.items()]
    texts_to_predict(llama.model, rows)
    made = {"mean": mean, "zero": zero, "resample": resample}[edit]()
    with progress_bar("ablating") as progress:
        found = sweep(llama.model, rows, over, made, progress=progress)
    print_sweep(found, rows, llama.tokenizer, edit, as_json=json)
