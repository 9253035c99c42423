"""The image token: the last id in Hugging Face's vision models, among the special tokens in Meta's.

In Meta's tokenizer `<|image|>` is 128011, but the model's id for an image is 128256, the first
after the vocabulary. Hugging Face's tokenizer uses that id, and the reserved tokens after
`<|image|>` move by one: 128011 is `<|reserved_special_token_2|>`, which is 128012 in Meta's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from llama_ref.vocabulary import SPECIAL_TOKENS, Vocabulary, special_start, unused_text

IMAGE = "<|image|>"
PLACE = SPECIAL_TOKENS.index(IMAGE)
# The other special tokens in Hugging Face's order, with one more reserved token: 256 again.
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
    """A vision model's vocabulary from Hugging Face's order to Meta's; any other is unchanged."""
    if vocabulary.special.get(IMAGE) != vocabulary.n_words - 1:
        return vocabulary
    special = {text: i for text, i in vocabulary.special.items() if text != IMAGE}
    return replace(vocabulary, special=_renamed(special, special_start(vocabulary.ranks), WITHOUT_IMAGE, SPECIAL_TOKENS))


def _renamed(special: Mapping[str, int], start: int, before: Sequence[str], after: Sequence[str]) -> dict[str, int]:
    """Rename the special tokens from the image's place on, if all of them have the names `before`.

    `start` is the id of the first special token.
    """
    names: Mapping[str, str] = {}
    if all(special.get(text) == start + i for i, text in enumerate(before) if i >= PLACE):
        names = dict(zip(before[PLACE:], after[PLACE:], strict=True))
    return {names.get(text, text): i for text, i in special.items()}
