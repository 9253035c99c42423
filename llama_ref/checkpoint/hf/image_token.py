"""The image token, which Hugging Face's vision models have after all others and Meta's among them.

In Meta's tokenizer `<|image|>` is 128011, but its model takes 128256 for an image, the first id after
the vocabulary. Hugging Face's tokenizer gives it that id, and moves up the reserved tokens after it:
128011 is `<|reserved_special_token_2|>`, in Meta's tokenizer 128012.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from llama_ref.vocabulary import SPECIAL_TOKENS, Vocabulary, special_start, unused_text

IMAGE = "<|image|>"
PLACE = SPECIAL_TOKENS.index(IMAGE)
# Of the 256 special tokens, in Hugging Face's order.
WITHOUT_IMAGE = (
    *(text for text in SPECIAL_TOKENS if text != IMAGE),
    f"<|reserved_special_token_{len(SPECIAL_TOKENS) - PLACE + 1}|>",
)


def with_image_last(vocabulary: Vocabulary) -> Vocabulary:
    """Meta's vocabulary as Hugging Face's vision models have it, with one more id."""
    special = _renamed(vocabulary.special, special_start(vocabulary.ranks), SPECIAL_TOKENS, WITHOUT_IMAGE)
    if place := special.pop(IMAGE, None):  # among tokens that were renamed
        special[unused_text(place)] = place
    return replace(vocabulary, special=special | {IMAGE: vocabulary.n_words})


def with_image_in_place(vocabulary: Vocabulary) -> Vocabulary:
    """The vocabulary of a vision model in Hugging Face's files as Meta has it; any other as it is."""
    if vocabulary.special.get(IMAGE) != vocabulary.n_words - 1:
        return vocabulary
    special = {text: i for text, i in vocabulary.special.items() if text != IMAGE}
    return replace(vocabulary, special=_renamed(special, special_start(vocabulary.ranks), WITHOUT_IMAGE, SPECIAL_TOKENS))


def _renamed(special: Mapping[str, int], start: int, before: Sequence[str], after: Sequence[str]) -> dict[str, int]:
    """Special tokens from `start` on, those from the image's place on by other names if all have their usual ones."""
    names: Mapping[str, str] = {}
    if all(special.get(text) == start + i for i, text in enumerate(before) if i >= PLACE):
        names = dict(zip(before[PLACE:], after[PLACE:], strict=True))
    return {names.get(text, text): i for text, i in special.items()}
