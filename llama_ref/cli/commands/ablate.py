"""`llama-ref ablate`."""

from typing import Annotated, Literal

from llama_ref.cli.flags import Flag, Section, command
from llama_ref.cli.options import Json, Name, SpecialTokens, WholeModel
from llama_ref.cli.studying import Prompt, open_to_study


@command(Section.STUDY)
def ablate(
    name: Name,
    prompt: Prompt,
    *,
    over: Annotated[
        Literal["heads", "kv_groups", "attention", "feed_forward", "layers", "units"],
        Flag("parts to leave out one by one; of units, the 32 with the largest estimates"),
    ] = "heads",
    edit: Annotated[
        Literal["mean", "zero", "resample"],
        Flag("in a part's place: its mean over the text, zero, or its value at random tokens"),
    ] = "mean",
    special_tokens: SpecialTokens = False,
    json: Json = False,
    loading: WholeModel,
) -> None:
    """Measure the loss of a text without each part of a model.

    llama-ref ablate Llama3.2-1B "The capital of France is Paris." --over layers
    """
    from llama_ref.cli.terminal import progress_bar
    from llama_ref.cli.views.study.sweep import print_sweep
    from llama_ref.study.ablation.losses import texts_to_predict
    from llama_ref.study.ablation.resample import resample
    from llama_ref.study.ablation.sweep import sweep
    from llama_ref.study.inputs import prompt_tokens
    from llama_ref.study.patch import mean, zero

    llama = open_to_study(name, loading, prompt=prompt)
    tokens = prompt_tokens(llama, prompt, special_tokens=special_tokens)
    texts_to_predict(llama.model, tokens)
    made = {"mean": mean, "zero": zero, "resample": resample}[edit]()
    with progress_bar("ablating") as progress:
        found = sweep(llama.model, tokens, over, made, progress=progress)
    print_sweep(found, tokens, llama.tokenizer, edit, as_json=json)
