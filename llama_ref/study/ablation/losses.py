"""The loss of texts: what is measured of an ablation."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.study.texts import Batch, Texts, as_texts

POSITIONS = 256  # whose logits are made at a time


def texts_to_predict(model: Transformer, texts: Texts) -> list[Tensor]:
    """Ids of texts (T,) of two tokens or more. Raises RequestError."""
    found = as_texts(model, texts)
    for i, text in enumerate(found):
        if len(text) < 2:
            raise RequestError(f"text {i} has one token, expected two or more: a loss is of tokens after the first")
    return found


def losses_of(model: Transformer, batch: Batch, hidden: Tensor) -> Tensor:
    """Mean loss of each text's tokens after the first, from the last norm (n, T, D): nats, float32 (n,)."""
    found = []
    for ids, length, states in zip(batch.ids, batch.lengths, hidden, strict=True):
        pieces = zip(states[: length - 1].split(POSITIONS), ids[1:length].split(POSITIONS), strict=True)
        total = [F.cross_entropy(model.logits(some), wanted, reduction="sum") for some, wanted in pieces]
        found.append(torch.stack(total).sum() / (length - 1))
    return torch.stack(found)


def check_count(what: str, given: int, least: int = 0) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or given < least:
        raise RequestError(f"{what} is {given!r:.40}, expected a whole number from {least}")
    return given


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error over the last axis, of texts; the error is NaN for one text."""
    n = values.shape[-1]
    error = values.std(-1) / n**0.5 if n > 1 else torch.full(values.shape[:-1], torch.nan, device="cpu")
    return values.mean(-1), error


def names_of(parts: Sequence[str] | str) -> list[str]:
    """A list of names, each once. Raises RequestError."""
    names = [parts] if isinstance(parts, str) else parts
    if not isinstance(names, Sequence) or not names:
        raise RequestError(f"parts is {parts!r:.60}, expected the name of one, such as layers.0.ffn, or a list of them")
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise RequestError(f"parts has {twice[0]!r:.60} twice: a part can be left out once")
    return list(names)
