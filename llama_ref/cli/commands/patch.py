"""`llama-ref patch`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.options import Json, Name, Png, SpecialTokens, WholeModel
from llama_ref.cli.shared.studying import TARGET_HELP, Out, check_outputs, first_token, open_to_study, overview_of, write_page
from llama_ref.errors import RequestError

NOISE_SCALE, NOISE_SEEDS = 3.0, 10


@command(Section.STUDY)
def patch(
    name: Name,
    clean: Annotated[str, Flag('text that leads to the target: "The capital of France is"')],
    corrupted: Annotated[
        str | None, Flag('text with as many tokens that does not: "The capital of Italy is"', unset="CLEAN, with --noise")
    ] = None,
    *,
    target: Annotated[str, Flag(TARGET_HELP)],
    other: Annotated[
        str | None,
        Flag("measure the difference to this token's logit", unset="measure the probability; with a gradient, its logarithm"),
    ] = None,
    noise: Annotated[
        str | None,
        Flag('instead of CORRUPTED: piece of CLEAN, such as "France", whose embeddings get noise (causal tracing)'),
    ] = None,
    noise_scale: Annotated[float, Flag("size of the noise, in standard deviations of the embedding")] = NOISE_SCALE,
    noise_seeds: Annotated[int, Flag("number of noisy runs to average")] = NOISE_SEEDS,
    over: Annotated[
        str,
        Flag(
            "layer,position (residual stream before a layer), layer,head or layer,position,head (head outputs)",
            metavar="AXES",
        ),
    ] = "layer,position",
    by: Annotated[
        Literal["exact", "gradient", "both"],
        Flag("run every cell, estimate all cells from a gradient, or do both to compare them"),
    ] = "exact",
    steps: Annotated[
        int | None,
        Flag("number of gradients between the two texts to average for an estimate", unset="one, at the corrupted text"),
    ] = None,
    out: Out = None,
    png: Png = None,
    special_tokens: SpecialTokens = False,
    json: Json = False,
    loading: WholeModel,
) -> None:
    """Find where a model tells two texts apart (activation patching).

    Runs the corrupted text with activations from the clean one, one cell of a grid at a time. With
    --by gradient all cells are estimated at once (attribution patching). --out writes the page of
    `lens --out` about the clean text, with the grids.

      llama-ref patch Llama3.2-1B "Paris is in" --noise Paris --target " France"
    """
    from llama_ref.cli.terminal import progress_bar
    from llama_ref.cli.views.study.grid import print_grids
    from llama_ref.study import figures
    from llama_ref.study.inputs import check_over, check_same_length, prompt_tokens
    from llama_ref.study.patching.exact import patch_grid
    from llama_ref.study.patching.gradient import attribution_patch, path_shares
    from llama_ref.study.patching.grid import GridPair, Measure
    from llama_ref.study.patching.metrics import log_probability, logit_difference, probability
    from llama_ref.study.patching.noise import noise as noise_on
    from llama_ref.study.subject import positions_of

    if corrupted is None and noise is None:
        raise RequestError("missing CORRUPTED or --noise: give what to compare the clean text with")
    if corrupted is not None and noise is not None:
        raise RequestError("CORRUPTED and --noise are given, expected one of them")
    if noise is None and (noise_scale, noise_seeds) != (NOISE_SCALE, NOISE_SEEDS):
        raise RequestError("--noise_scale or --noise_seeds is given without --noise: say which tokens get noise")
    axes = check_over(over)
    path_shares(steps)
    if steps is not None and by == "exact":
        raise RequestError("--steps is given, but --by is exact: use --by gradient or --by both")
    check_outputs(out, png)
    noise_on(0, noise_scale, noise_seeds)
    llama = open_to_study(name, loading, clean=clean, corrupted=corrupted, target=target, other=other)
    tokenizer = llama.tokenizer
    right = prompt_tokens(llama, clean, "clean", special_tokens=special_tokens)
    if noise is not None:
        wrong = right
        against_clean = noise_on(positions_of(tokenizer, right, noise, "--noise"), noise_scale, noise_seeds)
    else:
        wrong = prompt_tokens(llama, corrupted or "", "corrupted", special_tokens=special_tokens)
        check_same_length(tokenizer, right, wrong)
        against_clean = None
    other_text = wrong if against_clean is None else against_clean
    wanted = first_token(llama, "target", target, right)
    against = None if other is None else first_token(llama, "other", other, wrong)
    # The gradient of a probability vanishes at a corrupted text that has almost none.
    measure: Measure = "probability" if by == "exact" else "log-probability"
    single = {"probability": probability, "log-probability": log_probability}[measure]
    metric = single(wanted) if against is None else logit_difference(wanted, against)
    exact = estimate = None
    if by != "gradient":
        with progress_bar("patching") as progress:
            exact = patch_grid(llama.model, right, other_text, metric, over=axes, progress=progress)
    if by != "exact":
        with progress_bar("estimating") as progress:
            estimate = attribution_patch(llama.model, right, other_text, metric, axes, steps=steps, progress=progress)
    pair = GridPair(exact, estimate, right, wrong, wanted, against, against_clean, measure)
    if out is not None:
        seen = replace(overview_of(llama, right, wanted, 5), patched=pair)
        write_page(seen, llama, name, out)
    print_grids(pair, tokenizer, as_json=json)
    if png is not None:
        figures.check_pictures(png)
        for grid, file in ((exact, "patch.png"), (estimate, "patch-gradient.png")):
            if grid is not None:
                figures.draw_grid(grid, pair, tokenizer, Path(png) / file)
