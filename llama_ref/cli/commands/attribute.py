"""`llama-ref attribute`."""

from pathlib import Path
from typing import Annotated

from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.options import Json, Name, Png, SpecialTokens, WholeModel
from llama_ref.cli.shared.studying import TARGET_HELP, Prompt, check_outputs, first_token, open_to_study


@command(Section.STUDY)
def attribute(
    name: Name,
    prompt: Prompt,
    *,
    target: Annotated[str, Flag(TARGET_HELP)],
    other: Annotated[str | None, Flag("token to compare with; shares are then of the logit difference")] = None,
    png: Png = None,
    special_tokens: SpecialTokens = False,
    json: Json = False,
    loading: WholeModel,
) -> None:
    """Show which heads and layers made a token likely.

    This is direct logit attribution for the prediction after the prompt's last token.

      llama-ref attribute Llama3.2-1B "The capital of France is" --target " Paris"
    """
    from llama_ref.cli.views.study.attribution import print_attribution
    from llama_ref.study import figures
    from llama_ref.study.analyses import attribution
    from llama_ref.study.inputs import prompt_tokens

    check_outputs(png=png)
    llama = open_to_study(name, loading, prompt=prompt, target=target, other=other)
    tokens = prompt_tokens(llama, prompt, special_tokens=special_tokens)
    wanted = first_token(llama, "target", target, tokens)
    against = None if other is None else first_token(llama, "other", other, tokens)
    found = attribution.attribute(llama.model, tokens, wanted, against)
    if png is not None:
        figures.draw_attribution(found, llama.tokenizer, Path(png) / "attribution.png")
    print_attribution(found, llama.tokenizer, as_json=json)
