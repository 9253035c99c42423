"""Prompt lookup: guess that the text continues as it did after the same few tokens before."""

from collections.abc import Iterator
from contextlib import contextmanager

from llama_ref.decoding.drafting import AcceptanceRate, Draft, PassTime
from llama_ref.decoding.row import Row
from llama_ref.sampling import Sampler

# Prior acceptance rate by match length, until the text provides its own.
PRIOR_RATES = {1: 0.3, 2: 0.6, 3: 0.8}


class PromptLookup:
    """Speculation without a second model."""

    def __init__(self, pass_time: PassTime | None = None):
        self.pass_time = pass_time or PassTime()

    @contextmanager
    def drafting(self, rows: list[Row]) -> Iterator[list["PromptLookupDrafter"]]:
        yield [PromptLookupDrafter(self.pass_time) for _ in rows]


class PromptLookupDrafter:
    """Finds the last tokens of one row's text earlier in it: the latest of the longest matches.

    Every new token is compared with the guess of the longest match, whether or not that guess was
    made. So acceptance rates stay up to date, and text without repetitions soon gets no drafts and
    costs no more than plain decoding.
    """

    def __init__(self, pass_time: PassTime):
        self.pass_time = pass_time
        self.text: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # position after the latest occurrence of these tokens
        self.rates = {n: AcceptanceRate(prior) for n, prior in PRIOR_RATES.items()}

    def draft(self, row: Row, at_most: int, sampler: Sampler) -> Draft:
        self._read(row)
        length, position = self._look_up()
        if not length:
            return Draft()
        n_guesses = self.rates[length].best_length(at_most, self.pass_time)
        tokens = self.text[position : position + n_guesses]
        while len(tokens) < n_guesses:  # the match overlaps the end of the text: repeat its period
            tokens.append(tokens[position - len(self.text)])
        return Draft(tokens)

    def _read(self, row: Row) -> None:
        """Add the row's new tokens to the text."""
        if not self.text:
            for token in row.prompt:
                self._add(token)
        for token in row.generated[len(self.text) - len(row.prompt) :]:
            length, position = self._look_up()
            if length:
                self.rates[length].update(self.text[position] == token)
            self._add(token)

    def _add(self, token: int) -> None:
        for n in PRIOR_RATES:
            if n <= len(self.text):
                self.after[tuple(self.text[-n:])] = len(self.text)
        self.text.append(token)

    def _look_up(self) -> tuple[int, int]:
        """The longest match's length and the position after it; (0, 0) without a match."""
        found = ((n, self.after.get(tuple(self.text[-n:]))) for n in reversed(PRIOR_RATES))
        return next(((n, position) for n, position in found if position is not None), (0, 0))
