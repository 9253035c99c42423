"""The report's data as JSON for its page."""

import base64
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from llama_ref.study.analyses.attribution import Attribution
from llama_ref.study.analyses.logit_lens import LogitLens, Predictions
from llama_ref.study.analyses.overview import Overview
from llama_ref.study.analyses.residual import ResidualStream, quartiles_of_others
from llama_ref.study.analyses.saliency import Saliency
from llama_ref.study.inputs import label
from llama_ref.study.patching.grid import GridPair
from llama_ref.study.report.features import firing_data
from llama_ref.study.report.image_packing import PackedImage
from llama_ref.study.vision.image_attention import ImageAttention
from llama_ref.tokenizer import Tokenizer

DIGITS = 5  # significant digits: more than the page shows


def page_data(found: Overview, tokenizer: Tokenizer, model_name: str, image: PackedImage | None = None) -> dict[str, Any]:
    """The page's data except the attention patterns and the image; numbers that are not finite are None."""
    measures = ("sink", "previous", "induction", "entropy")
    return {
        "model": model_name,
        "dtype": found.dtype,
        "tokens": found.tokens,
        "target": found.target,
        "parts": _parts([tokenizer.token_bytes(token) if token < tokenizer.n_words else b"" for token in found.tokens]),
        "vocabulary": {token: _token(token, tokenizer) for token in sorted(_shown(found))},
        "predictions": _predictions(found.predictions),
        "lens": _lens(found.lens),
        "attention": {measure: _numbers(getattr(found.attention, measure)) for measure in measures},
        "kept": found.patterns.kept,
        "attribution": None if found.attribution is None else _attribution(found.attribution),
        "not_attributed": found.not_attributed,
        "residual": _residual(found.residual),
        "features": None if found.features is None else firing_data(found.features),
        "saliency": None if found.saliency is None else _saliency(found.saliency, tokenizer),
        "patched": None if found.patched is None else _patched(found.patched, tokenizer),
        "image": None if found.image is None or image is None else _image(found.image, image),
    }


def packed_layers(found: Overview) -> Iterator[tuple[str, str]]:
    """Yield each layer's block id and patterns: the heads' streams in base64, separated by spaces."""
    for layer, heads in enumerate(found.patterns.heads):
        yield f"layer-{layer}", " ".join(base64.b64encode(head).decode("ascii") for head in heads)


def to_json(data: dict[str, Any]) -> str:
    """ASCII-only JSON that cannot end a script element or start a tag."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _shown(found: Overview) -> set[int]:
    """All token ids that the page shows."""
    top_ids = (found.predictions.top_ids, found.lens.top_ids)
    return {*found.tokens, found.target}.union(*(ids.unique().tolist() for ids in top_ids))


def _token(token: int, tokenizer: Tokenizer) -> list[str | None]:
    """A token's label, and its bytes in hex; None for an id that the tokenizer does not have."""
    known = token < tokenizer.n_words
    return [label(tokenizer, token), tokenizer.token_bytes(token).hex(" ") if known else None]


def _parts(texts: list[bytes]) -> dict[int, str]:
    """The characters that several tokens share, such as an emoji, by each of their positions."""
    owners = [position for position, text in enumerate(texts) for _ in text]  # the token of each byte
    found, at = dict[int, str](), 0
    for char in b"".join(texts).decode("utf-8", errors="surrogateescape"):
        n_bytes = len(char.encode("utf-8", errors="surrogateescape"))
        sharing = sorted(set(owners[at : at + n_bytes]))
        at += n_bytes
        if len(sharing) > 1 and char.isprintable():
            found |= {position: found.get(position, "") + char for position in sharing}
    return found


def _predictions(found: Predictions) -> dict[str, Any]:
    return {
        "probability": _numbers(found.probability),
        "rank": _ranks(found.rank, found.probability),
        "top_ids": found.top_ids.tolist(),
        "top_probabilities": _numbers(found.top_probabilities),
    }


def _lens(lens: LogitLens) -> dict[str, Any]:
    followed = lens.followed
    assert followed is not None  # an overview's lens has a target
    return {
        "tuned": lens.is_tuned,
        "top_ids": lens.top_ids.tolist(),
        "top_probabilities": _numbers(lens.top_probabilities),
        "entropy": _numbers(lens.entropy),
        "kl": _numbers(lens.kl),
        "target_probability": _numbers(followed.probability),
        "target_rank": _ranks(followed.rank, followed.probability),
    }


def _attribution(found: Attribution) -> dict[str, Any]:
    return {
        "logit": _number(found.logit),
        "total": _number(found.total),
        "rounding": _number(found.logit - found.total),
        "embedding": _number(found.embedding),
        "heads": _numbers(found.heads),
        "ffns": _numbers(found.ffns),
        "cross": [[layer, _number(share)] for layer, share in found.cross.items()],
    }


def _saliency(found: Saliency, tokenizer: Tokenizer) -> dict[str, Any]:
    names = ("method", "of", "positions", "total", "value", "baseline_value", "missing")
    values = {name: getattr(found, name) for name in names}
    texts = {
        "answer": "".join(label(tokenizer, token) for token in found.answer),
        "other": None if found.other is None else label(tokenizer, found.other),
        "shares": _numbers(found.shares),
    }
    return texts | {name: _number(value) if isinstance(value, float) else value for name, value in values.items()}


def _patched(found: GridPair, tokenizer: Tokenizer) -> dict[str, Any]:
    agreement, grid = found.agreement, found.grids[0]
    grids = {"exact": found.exact, "estimate": found.estimate}
    shares = {name: None if own is None else _numbers(torch.from_numpy(own.restored)) for name, own in grids.items()}
    return shares | {
        "correlation": None if agreement is None else _number(agreement.correlation),
        "axes": list(grid.axes),
        "activation": grid.name,
        "clean": _number(grid.clean),
        "corrupted": _number(grid.corrupted),
        "text": [label(tokenizer, token) for token in found.corrupted],
        "noise": None if found.noise is None else list(found.noise.positions),
        "target": label(tokenizer, found.target),
        "other": None if found.other is None else label(tokenizer, found.other),
        "measure": found.measure,
    }


def _residual(found: ResidualStream) -> dict[str, Any]:
    """Measures at every point, within layers too; `medians` are over all tokens but the first."""
    measured = {measure: getattr(found, measure) for measure in ("norm", "drift", "to_last")}
    medians = {measure: _numbers(quartiles_of_others(values)[1]) for measure, values in measured.items()}
    return {measure: _numbers(values) for measure, values in measured.items()} | {"medians": medians}


def _image(found: ImageAttention, packed: PackedImage) -> dict[str, Any]:
    """The image's data besides the packed blocks. `largest` (X, t) is rounded only after packing."""
    height, width = found.pixels.shape[:2]
    rows, columns = found.patches.shape[2:]
    return {
        "width": width,
        "height": height,
        "rows": rows,
        "columns": columns,
        "patch_width": found.patch_size[0],
        "patch_height": found.patch_size[1],
        "size": packed.size,
        "before": found.before,
        "seen_by": found.seen_by,
        "positions": packed.positions,
        "largest": _numbers(packed.largest),
        "class_tokens": _numbers(found.class_tokens),
        "beside": _numbers(found.beside),
    }


def _ranks(ranks: Tensor, probabilities: Tensor) -> Any:
    """Ranks as nested lists; None where the probability is NaN."""
    flat = zip(ranks.flatten().tolist(), probabilities.flatten().tolist(), strict=True)
    return _shaped([None if math.isnan(probability) else rank for rank, probability in flat], ranks.shape)


def _numbers(values: Tensor) -> Any:
    """A tensor as nested lists."""
    return _shaped([_number(value) for value in values.flatten().tolist()], values.shape)


def _number(value: float) -> float | int | None:
    """Round to DIGITS; None if it is not finite, which JSON cannot express."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e9 else short


def _shaped(flat: list[Any], shape: Iterable[int]) -> list[Any]:
    for size in reversed(list(shape)[1:]):
        flat = [flat[i : i + size] for i in range(0, len(flat), size)]
    return flat
