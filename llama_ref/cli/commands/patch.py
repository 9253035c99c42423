"""`llama-ref patch`."""

from pathlib import Path
from typing import Annotated

from llama_ref.cli.flags import Flag, Section, command
from llama_ref.cli.options import Json, Name, Png, SpecialTokens, WholeModel
from llama_ref.cli.studying import TARGET_HELP, check_outputs, first_token, open_to_study


@command(Section.STUDY)
def patch(
    name: Name,
    clean: Annotated[str, Flag('text that leads to the target: "The capital of France is"')],
    corrupted: Annotated[str, Flag('text of as many tokens that does not: "The capital of Italy is"')],
    *,
    target: Annotated[str, Flag(TARGET_HELP)],
    other: Annotated[
        str | None,
        Flag("measure the difference to this token's logit", unset="measure the probability"),
    ] = None,
    over: Annotated[
        str,
        Flag(
            "layer,position (residual stream before a layer) or layer,head (head outputs)",
            metavar="AXES",
        ),
    ] = "layer,position",
    png: Png = None,
    special_tokens: SpecialTokens = False,
    json: Json = False,
    loading: WholeModel,
) -> None:
    """Find where a model tells two texts apart (activation patching).

    Runs the corrupted text with activations from the clean one, one cell of a grid at a time.
    """
    from llama_ref.cli.terminal import progress_bar
    from llama_ref.cli.views.study.grid import print_grid
    from llama_ref.study import figures
    from llama_ref.study.inputs import check_over, check_same_length, prompt_tokens
    from llama_ref.study.patching.exact import patch_grid
    from llama_ref.study.patching.metrics import logit_difference, probability

    axes = check_over(over)
    check_outputs(png=png)
    llama = open_to_study(name, loading, clean=clean, corrupted=corrupted, target=target, other=other)
    tokenizer = llama.tokenizer
    texts = (
        prompt_tokens(llama, clean, "clean", special_tokens=special_tokens),
        prompt_tokens(llama, corrupted, "corrupted", special_tokens=special_tokens),
    )
    check_same_length(tokenizer, *texts)
    wanted = first_token(llama, "target", target, texts[0])
    against = None if other is None else first_token(llama, "other", other, texts[1])
    if against is None:
        metric = probability(wanted)
    else:
        metric = logit_difference(wanted, against)
    with progress_bar("patching") as progress:
        found = patch_grid(llama.model, *texts, metric, over=axes, progress=progress)
    if png is not None:
        path = Path(png) / "patch.png"
        figures.draw_grid(found, *texts, tokenizer, wanted, against, path)
    print_grid(found, *texts, tokenizer, wanted, against, as_json=json)
