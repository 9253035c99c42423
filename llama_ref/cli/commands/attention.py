"""`llama-ref attention`."""

from pathlib import Path
from typing import Annotated

from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.options import Json, Name, Png, SpecialTokens, WholeModel
from llama_ref.cli.shared.studying import ImageFlag, Prompt, check_image, check_outputs, open_to_study, text_ids
from llama_ref.errors import RequestError


@command(Section.STUDY)
def attention(
    name: Name,
    prompt: Prompt,
    *,
    layer: Annotated[int | None, Flag("only this layer, counted from 0", unset="all")] = None,
    head: Annotated[int | None, Flag("show where this head of --layer looks from each token", unset="all")] = None,
    image: ImageFlag = None,
    png: Png = None,
    special_tokens: SpecialTokens = False,
    json: Json = False,
    loading: WholeModel,
) -> None:
    """Show where attention heads look.

    For every head: how much it looks at the first token (sink), at the previous token, and at the
    token that followed the same token earlier (induction). With --head, one head token by token.

    With --image, where each token looks in the image. --layer then counts the cross-attention
    layers alone.
    """
    from llama_ref.checkpoint.folder import open_folder
    from llama_ref.cli.views.study.attention import print_attention, print_pattern
    from llama_ref.cli.views.study.image_attention import print_image_attention
    from llama_ref.study import figures
    from llama_ref.study.analyses.attention import attention_pattern, summarize_attention
    from llama_ref.study.inputs import check_index, prompt_tokens
    from llama_ref.study.vision.image_attention import image_attention

    if head is not None and layer is None and image is None:
        raise RequestError(f"--head {head} needs --layer: heads are numbered within a layer")
    check_outputs(png=png)
    args = open_folder(name).read_args()
    if image is not None:
        check_image(args, image)
    layer = None if layer is None else check_index("--layer", layer, args.n_layers if image is None else len(args.cross_layers))
    head = None if head is None else check_index("--head", head, args.n_heads)
    llama = open_to_study(name, loading, prompt=prompt)
    tokens = prompt_tokens(llama, prompt, special_tokens=special_tokens, has_image=image is not None)
    tokenizer = llama.tokenizer
    if image is not None:
        (seen,) = image_attention(llama.model, tokens, [image], head=head)
        if png is not None:
            figures.draw_image_attention(seen, tokenizer, Path(png) / "image.png", layer)
            figures.draw_image_layers(seen, tokenizer, Path(png) / "image-layers.png")
        print_image_attention(seen, tokenizer, layer, as_json=json)
        return
    if layer is None or head is None:
        summary = summarize_attention(llama.model, tokens, bos=tokenizer.bos_id, ids=text_ids(llama))
        if png is not None:
            figures.draw_attention(summary, tokenizer, Path(png) / "attention.png", layer)
        print_attention(summary, tokenizer, layer, as_json=json)
        return
    pattern = attention_pattern(llama.model, tokens, layer, head)
    if png is not None:
        figures.draw_pattern(pattern, tokens, tokenizer, layer, head, Path(png) / "pattern.png")
    print_pattern(pattern, tokens, tokenizer, layer, head, as_json=json)
