"""The report's numbers as its page reads them: plain JSON, with every token's text beside."""

import base64
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from llama_ref.study.attribution import Attribution
from llama_ref.study.inputs import label
from llama_ref.study.logit_lens import LogitLens, Predictions
from llama_ref.study.overview import Overview
from llama_ref.study.residual import ResidualStream, quartiles_of_others
from llama_ref.tokenizer import Tokenizer

DIGITS = 5  # of a number: more than any picture shows


def page_data(found: Overview, tokenizer: Tokenizer, model_name: str) -> dict[str, Any]:
    """All but the attention patterns; numbers that are not finite are None."""
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
    }


def packed_layers(found: Overview) -> Iterator[str]:
    """A layer's patterns at a time: every head's stream in base64, with spaces between."""
    for heads in found.patterns.heads:
        yield " ".join(base64.b64encode(head).decode("ascii") for head in heads)


def to_json(data: dict[str, Any]) -> str:
    """JSON in which nothing can end a script element or begin a tag, whatever a prompt or a token is; ASCII alone."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _shown(found: Overview) -> set[int]:
    """Every id that the page shows anywhere."""
    likeliest = (found.predictions.top_ids, found.lens.top_ids)
    return {*found.tokens, found.target}.union(*(ids.unique().tolist() for ids in likeliest))


def _token(token: int, tokenizer: Tokenizer) -> list[str | None]:
    """Its text as it may be shown, and its bytes in hex; a row of the model's that is no token has none."""
    known = token < tokenizer.n_words
    return [label(tokenizer, token), tokenizer.token_bytes(token).hex(" ") if known else None]


def _parts(texts: list[bytes]) -> dict[int, str]:
    """The characters that several tokens share, for each of these: a Korean or an emoji often has three."""
    owners = [position for position, text in enumerate(texts) for _ in text]  # of each byte
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
    return {
        "top_ids": lens.top_ids.tolist(),
        "top_probabilities": _numbers(lens.top_probabilities),
        "entropy": _numbers(lens.entropy),
        "kl": _numbers(lens.kl),
        "target_probability": _numbers(lens.target_probability),
        "target_rank": _ranks(lens.target_rank, lens.target_probability),
    }


def _attribution(found: Attribution) -> dict[str, Any]:
    return {
        "logit": _number(found.logit),
        "total": _number(found.total),
        "rounding": _number(found.logit - found.total),
        "embedding": _number(found.embedding),
        "heads": _numbers(found.heads),
        "ffns": _numbers(found.ffns),
    }


def _residual(found: ResidualStream) -> dict[str, Any]:
    """Of every point, within layers too: twice as many as the lens has, less one; `medians` are of all tokens but the first."""
    measured = {measure: getattr(found, measure) for measure in ("norm", "drift", "to_last")}
    medians = {measure: _numbers(quartiles_of_others(values)[1]) for measure, values in measured.items()}
    return {measure: _numbers(values) for measure, values in measured.items()} | {"medians": medians}


def _ranks(ranks: Tensor, probabilities: Tensor) -> Any:
    """None where there is no probability: among numbers that are not finite nothing has a rank."""
    flat = zip(ranks.flatten().tolist(), probabilities.flatten().tolist(), strict=True)
    return _shaped([None if math.isnan(probability) else rank for rank, probability in flat], ranks.shape)


def _numbers(values: Tensor) -> Any:
    """Nested lists of a tensor's shape."""
    return _shaped([_number(value) for value in values.flatten().tolist()], values.shape)


def _number(value: float) -> float | int | None:
    """Rounded; None where it is not finite, for which JSON has no word."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e9 else short


def _shaped(flat: list[Any], shape: Iterable[int]) -> list[Any]:
    for size in reversed(list(shape)[1:]):
        flat = [flat[i : i + size] for i in range(0, len(flat), size)]
    return flat
