"""Find the tokens that hold a piece of a text."""

from collections.abc import Sequence
from itertools import accumulate

from llama_ref.errors import RequestError
from llama_ref.study.inputs import check_not_empty
from llama_ref.tokenizer import Tokenizer


def positions_of(tokenizer: Tokenizer, tokens: Sequence[int], text: str, name: str = "text") -> list[int]:
    """Positions of the tokens that hold any part of `text`, which must occur once in the tokens' text.

    Special tokens have no text. Raises RequestError, which calls the text `name`.
    """
    check_not_empty(**{name: text})
    special = set(tokenizer.special_tokens.values())
    parts = [b"\0" if token in special else tokenizer.token_bytes(token) for token in tokens]
    whole, wanted = b"".join(parts), text.encode()
    n = whole.count(wanted)
    if n != 1:
        found = f"{n} times" if n else "not"
        raise RequestError(f"{name} is {text!r:.60}, which is {found} in the text: give a piece that occurs once")
    begin = whole.index(wanted)
    ends = list(accumulate(map(len, parts)))
    starts = [0, *ends]
    return [i for i, end in enumerate(ends) if end > begin and starts[i] < begin + len(wanted)]
