"""A guard's verdict on a message, and how it is parsed from the model's answer."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from llama_ref.guard.categories import CODE, Category

Word = Literal["safe", "unsafe", "unexpected"]

AS_TRAINED = re.compile(r"safe|unsafe\n[A-Z]\d+(,[A-Z]\d+)*")


@dataclass(frozen=True)
class Verdict:
    """The verdict on the last message of a conversation.

    `word` is "unexpected" if the model's likeliest answer begins with neither "safe" nor "unsafe";
    then nothing is known about the message. The probabilities are those of the two words among all
    tokens at the verdict's position, and `unsafe_ratio` is P(unsafe) / (P(safe) + P(unsafe)).
    `categories` are those that the answer names, in its order; `excluded` are excluded codes that
    it names nevertheless, `unknown` codes that are not in the list. `answer` is the full answer
    that was parsed.
    """

    word: Word
    unsafe_probability: float
    safe_probability: float
    unsafe_ratio: float
    categories: tuple[Category, ...] = ()
    excluded: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    answer: str = "safe"

    @property
    def is_safe(self) -> bool:
        """Whether the verdict is "safe"; False for an unexpected answer too."""
        return self.word == "safe"

    @property
    def is_expected(self) -> bool:
        """Whether the answer has the form that the releases were trained to write."""
        return AS_TRAINED.fullmatch(self.answer) is not None


@dataclass(frozen=True)
class Probabilities:
    """Probabilities of "unsafe" and "safe" at the verdict's position, and their ratio."""

    unsafe: float
    safe: float
    ratio: float


def read_verdict(
    answer: str, probabilities: Probabilities, categories: Sequence[Category], excluded: Collection[str]
) -> Verdict:
    """Parse the verdict in an answer: the word on the first line, the codes on the second.

    Codes of excluded categories do not count: an answer that names only these means safe.
    """
    first, _, rest = answer.strip().partition("\n")
    word: Word = "safe" if first == "safe" else "unsafe" if first == "unsafe" else "unexpected"
    codes = [code.strip() for code in rest.partition("\n")[0].split(",")] if word == "unsafe" else []
    codes = [code for code in dict.fromkeys(codes) if CODE.fullmatch(code)]
    known = {category.code: category for category in categories}
    counted = [code for code in codes if code not in excluded]
    if codes and not counted:
        word = "safe"
    return Verdict(
        word,
        probabilities.unsafe,
        probabilities.safe,
        probabilities.ratio,
        categories=tuple(known[code] for code in counted if code in known),
        excluded=tuple(code for code in codes if code in excluded),
        unknown=tuple(code for code in counted if code not in known),
        answer=answer.strip(),
    )
