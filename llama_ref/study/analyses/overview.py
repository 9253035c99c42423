"""All measurements of one text that a report shows (study/report/writer.py)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llama_ref.errors import LlamaRefError, RequestError
from llama_ref.formatting import dtype_name
from llama_ref.images import open_image
from llama_ref.model import Transformer
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.quantization.apply import is_quantized
from llama_ref.study.analyses.attention import AttentionSummary, attention_pattern, summarize_attention
from llama_ref.study.analyses.attribution import Attribution, attribute
from llama_ref.study.analyses.logit_lens import (
    Lens,
    LogitLens,
    Predictions,
    block_ends,
    check_top,
    logit_lens,
    predict,
    residual_points,
)
from llama_ref.study.analyses.residual import ResidualStream, residual_stream
from llama_ref.study.analyses.saliency import Saliency
from llama_ref.study.features.firing import Firing
from llama_ref.study.inputs import check_token, one_row
from llama_ref.study.passes.hooks import check_model
from llama_ref.study.patching.grid import GridPair
from llama_ref.study.report.packing import PackedPatterns, how_many_kept, pack
from llama_ref.study.vision.image_attention import ImageAttention, image_attention
from llama_ref.study.vision.images import Images, encoding_once

if TYPE_CHECKING:
    from llama_ref.images import ImageFile

# At this length one layer's patterns take 0.5 GB in a model of 32 heads, with up to three copies at
# once; an 8B's residual stream takes 1.1 GB, and its page up to 65 MB. Patterns grow quadratically.
MOST_TOKENS = 2048


@dataclass(frozen=True)
class Overview:
    """Everything measured on one text. `lens` has the embedding and the end of every layer.

    `patterns` has the largest attention weights of every head. `strongest` is the layer, head and
    whole pattern, float32 (T, T), of the head with the largest share of the target's logit.
    `image` is where in the image the tokens look, None without an image. `attribution` and `strongest`
    are None if the shares do not add up to the logit, for example because a weight is not finite;
    `not_attributed` then says why. `overview` leaves `features`, `saliency` and `patched` None;
    `dataclasses.replace` can add them if they are of the same tokens (for `patched`: its clean text).
    """

    tokens: list[int]
    target: int
    dtype: str
    predictions: Predictions
    lens: LogitLens
    attention: AttentionSummary
    patterns: PackedPatterns
    attribution: Attribution | None
    not_attributed: str | None
    strongest: tuple[int, int, Tensor] | None
    residual: ResidualStream
    image: ImageAttention | None = None
    features: Firing | None = None
    saliency: Saliency | None = None
    patched: GridPair | None = None


@torch.no_grad()
@encoding_once()
def overview(
    model: Transformer,
    tokens: Sequence[int] | Tensor,
    *,
    target: int | None = None,
    top: int = 5,
    bos: int | None = None,
    ids: Sequence[int] | None = None,
    image: "ImageFile | None" = None,
    lens: Lens | None = None,
    progress: Progress | None = None,
) -> Overview:
    """Run all of a report's measurements on one sequence, with the `top` most likely tokens at each point.

    `target` is the token that the lens follows and whose logit is attributed (default: the model's
    most likely next token). `bos` and `ids` are for the induction score's random tokens. `image` is placed
    where the tokens have the model's `image_id`. `lens`: a tuned lens in place of the logit lens.
    `progress` is called with the steps done and their number. Raises RequestError, also for more
    than 2,048 tokens.
    """
    check_model(model)
    row = one_row(model, tokens)
    _check_length(row.shape[1])
    top = check_top(model, top)
    target = None if target is None else check_token(model, target)
    every = residual_points(model.args.n_layers)
    ends = [every[p] for p in block_ends(every)]
    images = None if image is None else [open_image(image)]
    steps = ProgressCounter(5 + len(ends) + model.args.n_layers + (images is not None), progress)
    steps.advance(0)

    attention, patterns = _attention(model, row, bos, ids, images, steps)  # first: it checks more arguments
    predictions = predict(model, row, top, images=images)
    steps.advance()
    target = int(predictions.top_ids[-1, 0]) if target is None else target
    read = logit_lens(model, row, target=target, top=top, points=ends, images=images, lens=lens)
    steps.advance(len(ends))
    attribution, not_attributed = _attribution(model, row, target, images)
    steps.advance()
    strongest = None if attribution is None else _pattern_of(model, row, *attribution.strongest_head, images)
    steps.advance()
    seen = None
    if images is not None:
        (seen,) = image_attention(model, row, images)
        steps.advance()
    found = Overview(
        tokens=row[0].tolist(),
        target=target,
        dtype=_dtype(model),
        predictions=predictions,
        lens=read,
        attention=attention,
        patterns=patterns,
        attribution=attribution,
        not_attributed=not_attributed,
        strongest=strongest,
        residual=residual_stream(model, row, images=images),
        image=seen,
    )
    steps.advance()
    return found


def _check_length(n_tokens: int) -> None:
    if n_tokens > MOST_TOKENS:
        raise RequestError(
            f"the text has {n_tokens:,} tokens, but a report holds at most {MOST_TOKENS:,}: every head's attention is a matrix"
            " of tokens by tokens; shorten the text"
        )


def _attention(
    model: Transformer,
    row: Tensor,
    bos: int | None,
    ids: Sequence[int] | None,
    images: Images | None,
    steps: ProgressCounter,
) -> tuple[AttentionSummary, PackedPatterns]:
    T, packed = row.shape[1], list[list[bytes]]()

    def see(pattern: Tensor) -> None:
        packed.append(pack(pattern, how_many_kept(T)))
        steps.advance()

    summary = summarize_attention(model, row, bos=bos, ids=ids, images=images, see=see)
    steps.advance()
    return summary, PackedPatterns(T, how_many_kept(T), packed)


def _attribution(model: Transformer, row: Tensor, target: int, images: Images | None) -> tuple[Attribution | None, str | None]:
    try:
        return attribute(model, row, target, images=images), None
    except RequestError:
        raise
    except LlamaRefError as error:  # the shares do not add up
        return None, str(error)


def _pattern_of(model: Transformer, row: Tensor, layer: int, head: int, images: Images | None) -> tuple[int, int, Tensor]:
    return layer, head, attention_pattern(model, row, layer, head, images=images)


def _dtype(model: Transformer) -> str:
    """The data type that the model computes in, for display."""
    dtype = dtype_name(model.norm.weight.dtype)
    return f"{dtype}, quantized matrices" if is_quantized(model) else dtype
