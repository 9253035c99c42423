"""`llama-ref lens`."""

from typing import Annotated

from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.options import Json, Name, Png, SpecialTokens, WholeModel
from llama_ref.cli.shared.studying import (
    TARGET_HELP,
    ImageFlag,
    Out,
    Prompt,
    check_image,
    check_outputs,
    first_token,
    open_to_study,
    overview_of,
    write_page,
)


@command(Section.STUDY)
def lens(
    name: Name,
    prompt: Prompt,
    *,
    target: Annotated[str | None, Flag(f"follow this {TARGET_HELP}")] = None,
    image: ImageFlag = None,
    tuned: Annotated[
        str | None, Flag("use this tuned lens: a folder of tune_lens, or in the published format", metavar="FOLDER")
    ] = None,
    top: Annotated[int, Flag("number of most likely tokens to show")] = 5,
    out: Out = None,
    png: Png = None,
    special_tokens: SpecialTokens = False,
    json: Json = False,
    loading: WholeModel,
) -> None:
    """Show what each layer would predict next (the logit lens).

    The output matrix is applied to the residual stream after every layer. --json also has the
    points within layers, and every token.

      llama-ref lens Llama3.2-1B "The capital of France is" --target " Paris"
    """
    from llama_ref.checkpoint.folder import open_folder
    from llama_ref.cli.terminal import note
    from llama_ref.cli.views.study.lens import print_lens
    from llama_ref.study import figures
    from llama_ref.study.analyses.logit_lens import logit_lens
    from llama_ref.study.inputs import prompt_tokens
    from llama_ref.study.tuned.lens import TunedLens
    from llama_ref.study.vision.images import encoding_once

    check_outputs(out, png)
    if image is not None:
        check_image(open_folder(name).read_args(), image)
    translators = None if tuned is None else TunedLens.load(tuned)
    llama = open_to_study(name, loading, prompt=prompt, target=target)
    tokens = prompt_tokens(llama, prompt, special_tokens=special_tokens, has_image=image is not None)
    positions, images = None if json else [-1], None if image is None else [image]
    with encoding_once():
        wanted = None if target is None else first_token(llama, "target", target, tokens, image)
        seen = None if out is None and png is None else overview_of(llama, tokens, wanted, top, image, translators)
        found = logit_lens(llama.model, tokens, target=wanted, top=top, positions=positions, images=images, lens=translators)
    if seen is not None and out is not None:
        write_page(seen, llama, name, out)
    print_lens(found, llama.tokenizer, as_json=json)
    if seen is not None and png is not None:  # last: matplotlib may be missing
        figures.check_pictures(png)
        figures.draw_overview(seen, llama.tokenizer, png)
        note(f"wrote pictures into {png}")
