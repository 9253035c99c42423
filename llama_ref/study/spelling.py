"""Check whether the model expects a target with or without its leading space: these are different tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llama_ref.model import Transformer
from llama_ref.study.texts import Batch, as_texts
from llama_ref.study.vision.images import Images
from llama_ref.tokenizer import Tokenizer


@dataclass(frozen=True)
class OtherSpelling:
    """The other spelling of a text, and how likely the first token of each is."""

    text: str
    probability: float
    given_probability: float


@torch.no_grad()
def likelier_spelling(
    model: Transformer, tokenizer: Tokenizer, prompt: Sequence[int], text: str, images: Images | None = None
) -> OtherSpelling | None:
    """The other spelling of a continuation, with or without its leading space, if the model finds it likelier.

    There should be one space between a prompt and a word. Only if there is none, or two, this runs the
    prompt with its images to compare the spellings.
    """
    has_space = text.startswith(" ")
    other = text[1:] if has_space else f" {text}"
    if not other or has_space != tokenizer.token_bytes(prompt[-1]).endswith(b" "):
        return None
    ids = [tokenizer.encode(spelled, bos=False, eos=False)[0] for spelled in (text, other)]
    if tokenizer.token_bytes(ids[1]) == b" ":  # not a spelling of the word
        return None
    hidden = Batch.from_texts(model, as_texts(model, prompt), images).hidden(model)[:, -1]
    given_probability, probability = model.logits(hidden)[0].softmax(-1)[ids].tolist()
    return OtherSpelling(other, probability, given_probability) if probability > given_probability else None
