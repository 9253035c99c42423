"""The measure of ablations: the mean loss of each text."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.study.losses import loss_sums
from llama_ref.study.texts import Batch, Texts, as_texts


def texts_to_predict(model: Transformer, texts: Texts) -> list[Tensor]:
    """Ids of texts (T,) of two tokens or more. Raises RequestError."""
    found = as_texts(model, texts)
    for i, text in enumerate(found):
        if len(text) < 2:
            raise RequestError(f"text {i} has one token, expected two or more: the first token has no loss")
    return found


def losses_of(model: Transformer, batch: Batch, hidden: Tensor) -> Tensor:
    """Mean loss of each text's tokens after the first, from the last norm (n, T, D): nats, float32 (n,)."""
    return loss_sums(model, batch, hidden) / torch.tensor([length - 1 for length in batch.lengths], device=hidden.device)


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error over the last axis (texts); the error is NaN for one text."""
    n = values.shape[-1]
    error = values.std(-1) / n**0.5 if n > 1 else torch.full(values.shape[:-1], torch.nan, device="cpu")
    return values.mean(-1), error


def names_of(parts: Sequence[str] | str) -> list[str]:
    """A list of part names. Raises RequestError for anything else, or a duplicate."""
    names = [parts] if isinstance(parts, str) else parts
    if not isinstance(names, Sequence) or not names:
        raise RequestError(f"parts is {parts!r:.60}, expected the name of one, such as layers.0.ffn, or a list of them")
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise RequestError(f"parts has {twice[0]!r:.60} twice: a part can be left out once")
    return list(names)
