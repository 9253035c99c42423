"""`llama-ref saliency`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, cast

from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.options import Json, Name, Png, SpecialTokens, WholeModel
from llama_ref.cli.shared.studying import (
    TARGET_HELP,
    Out,
    Prompt,
    check_outputs,
    first_token,
    open_to_study,
    overview_of,
    write_page,
)
from llama_ref.errors import RequestError


@command(Section.STUDY)
def saliency(
    name: Name,
    prompt: Prompt,
    *,
    target: Annotated[str | None, Flag(TARGET_HELP, unset="the likeliest next one")] = None,
    other: Annotated[str | None, Flag("token to compare with; shares are then of the logit difference")] = None,
    answer: Annotated[str | None, Flag("whole answer instead of one token; shares are then of its tokens' mean")] = None,
    method: Annotated[
        Literal["integrated", "gradient_x_input", "gradient"],
        Flag("integrated gradients, the gradient times the embedding, or its length"),
    ] = "integrated",
    of: Annotated[
        Literal["logit", "log_probability"] | None,
        Flag("value to split into shares", unset="logit; log_probability with --answer"),
    ] = None,
    steps: Annotated[int | None, Flag("number of gradients between baseline and text", unset="32")] = None,
    baseline: Annotated[
        Literal["mean", "zero"] | None,
        Flag("embedding to start from: the mean of all embeddings, or zero", unset="mean"),
    ] = None,
    out: Out = None,
    png: Png = None,
    special_tokens: SpecialTokens = False,
    json: Json = False,
    loading: WholeModel,
) -> None:
    """Show which tokens of a prompt made a prediction (gradients).

    The begin-of-text token is left as it is and has no share. --out writes the page of `lens --out`
    with the shares.

      llama-ref saliency Llama3.2-1B "The capital of France is" --target " Paris"
    """
    from llama_ref.cli.terminal import progress_bar
    from llama_ref.cli.views.study.saliency import print_saliency
    from llama_ref.study import figures
    from llama_ref.study.analyses.logit_lens import predict
    from llama_ref.study.analyses.saliency import Method, check_steps
    from llama_ref.study.analyses.saliency import saliency as measure
    from llama_ref.study.inputs import check_not_empty, prompt_tokens

    if answer is not None and (target is not None or other is not None):
        raise RequestError("--answer is given with --target or --other, expected --answer alone")
    if method != "integrated" and (steps is not None or baseline is not None):
        raise RequestError(f"--method is {method}, but --steps and --baseline are only for integrated: leave them out")
    steps = check_steps(32 if steps is None else steps)
    check_not_empty(answer=answer)
    check_outputs(out, png)
    llama = open_to_study(name, loading, prompt=prompt, target=target, other=other)
    tokens = prompt_tokens(llama, prompt, special_tokens=special_tokens)
    wanted: int | list[int]
    if answer is not None:
        wanted = llama.tokenizer.encode(answer, bos=False, eos=False)
    elif target is not None:
        wanted = first_token(llama, "target", target, tokens)
    else:
        wanted = int(predict(llama.model, tokens, 1).top_ids[-1, 0])
    against = None if other is None else first_token(llama, "other", other, tokens)
    with progress_bar("saliency") as progress:
        found = measure(
            llama.model,
            tokens,
            wanted,
            against,
            method=cast(Method, method.replace("_x_", "×")),
            of=of,
            positions=range(1, len(tokens)) if len(tokens) > 1 else None,
            steps=steps,
            baseline=baseline or "mean",
            progress=progress,
        )
    if out is not None:
        seen = overview_of(llama, tokens, found.answer[0], 5)
        write_page(replace(seen, saliency=found), llama, name, out)
    print_saliency(found, llama.tokenizer, as_json=json)
    if png is not None:
        figures.check_pictures(png)
        figures.draw_saliency(found, llama.tokenizer, Path(png) / "saliency.png")
