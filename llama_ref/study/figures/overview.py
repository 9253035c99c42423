"""All pictures of one text."""

from pathlib import Path

from llama_ref.study.analyses.overview import Overview
from llama_ref.study.figures.attention import draw_attention, draw_pattern
from llama_ref.study.figures.attribution import draw_attribution
from llama_ref.study.figures.image_attention import draw_image_attention, draw_image_layers
from llama_ref.study.figures.lens import draw_lens, draw_target
from llama_ref.study.figures.residual import draw_norms
from llama_ref.tokenizer import Tokenizer


def draw_overview(found: Overview, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Draw lens.png, target.png, attention.png and norms.png; with an attribution, also attribution.png and pattern.png.

    With an image, also image.png and image-layers.png. The pattern is that of the head with the largest
    share of the target's logit.
    """
    folder = Path(folder)
    draw_lens(found.lens, tokenizer, folder / "lens.png")
    draw_target(found.lens, tokenizer, folder / "target.png")
    draw_attention(found.attention, tokenizer, folder / "attention.png")
    draw_norms(found.residual, tokenizer, folder / "norms.png")
    if found.image is not None:
        draw_image_attention(found.image, tokenizer, folder / "image.png")
        draw_image_layers(found.image, tokenizer, folder / "image-layers.png")
    if found.attribution is not None:
        draw_attribution(found.attribution, tokenizer, folder / "attribution.png")
    if found.strongest is not None:
        layer, head, pattern = found.strongest
        draw_pattern(pattern, found.tokens, tokenizer, layer, head, folder / "pattern.png")
