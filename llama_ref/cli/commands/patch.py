"""`llama-ref patch`."""

from pathlib import Path
from typing import Annotated, Literal

from llama_ref.cli.flags import Flag, Section, command
from llama_ref.cli.options import Json, Name, Png, SpecialTokens, WholeModel
from llama_ref.cli.studying import TARGET_HELP, check_outputs, first_token, open_to_study
from llama_ref.errors import RequestError


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
            "layer,position (residual stream before a layer), layer,head or layer,position,head (head outputs)",
            metavar="AXES",
        ),
    ] = "layer,position",
    by: Annotated[
        Literal["exact", "gradient", "both"],
        Flag("run every cell, estimate all by a gradient, or both, to compare them"),
    ] = "exact",
    steps: Annotated[
        int | None,
        Flag("gradients between the two texts to average for an estimate", unset="one, at the corrupted text"),
    ] = None,
    png: Png = None,
    special_tokens: SpecialTokens = False,
    json: Json = False,
    loading: WholeModel,
) -> None:
    """Find where a model tells two texts apart (activation patching).

    Runs the corrupted text with activations from the clean one, one cell of a grid at a time. With
    --by gradient all cells are estimated at once (attribution patching).
    """
    from llama_ref.cli.terminal import progress_bar
    from llama_ref.cli.views.study.grid import print_grids
    from llama_ref.study import figures
    from llama_ref.study.inputs import check_over, check_same_length, prompt_tokens
    from llama_ref.study.patching.exact import patch_grid
    from llama_ref.study.patching.gradient import attribution_patch, path_shares
    from llama_ref.study.patching.metrics import logit_difference, probability

    axes = check_over(over)
    path_shares(steps)
    if steps is not None and by == "exact":
        raise RequestError("--steps is given, but --by is exact: take --by gradient or --by both")
    if png is not None and axes == "layer×position×head":
        raise RequestError(f"--png draws grids of two axes, but --over is {over}")
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
    exact = estimate = None
    if by != "gradient":
        with progress_bar("patching") as progress:
            exact = patch_grid(llama.model, *texts, metric, over=axes, progress=progress)
    if by != "exact":
        with progress_bar("estimating") as progress:
            estimate = attribution_patch(llama.model, *texts, metric, over=axes, steps=steps, progress=progress)
    if png is not None:
        for grid, file in ((exact, "patch.png"), (estimate, "patch-gradient.png")):
            if grid is not None:
                figures.draw_grid(grid, *texts, tokenizer, wanted, against, Path(png) / file)
    print_grids(exact, estimate, *texts, tokenizer, wanted, against, as_json=json)
