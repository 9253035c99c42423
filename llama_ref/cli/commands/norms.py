"""`llama-ref norms`."""

from pathlib import Path

from llama_ref.cli.parsing.flags import Section, command
from llama_ref.cli.shared.options import Json, Name, Png, SpecialTokens, WholeModel
from llama_ref.cli.shared.studying import Prompt, check_outputs, open_to_study


@command(Section.STUDY)
def norms(
    name: Name,
    prompt: Prompt,
    *,
    png: Png = None,
    special_tokens: SpecialTokens = False,
    json: Json = False,
    loading: WholeModel,
) -> None:
    """Show how the residual stream grows and turns, layer by layer.

    --json also has the points within layers, and every token.
    """
    from llama_ref.cli.views.study.residual import print_norms
    from llama_ref.study import figures
    from llama_ref.study.analyses.residual import residual_stream
    from llama_ref.study.inputs import prompt_tokens

    check_outputs(png=png)
    llama = open_to_study(name, loading, prompt=prompt)
    found = residual_stream(llama.model, prompt_tokens(llama, prompt, special_tokens=special_tokens))
    if png is not None:
        figures.draw_norms(found, llama.tokenizer, Path(png) / "norms.png")
    print_norms(found, llama.tokenizer, as_json=json)
