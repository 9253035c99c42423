"""One sequence of a batch that is being generated."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llama_ref.images import Tiles

FinishReason = Literal["stop", "length"]


@dataclass
class Row:
    """A prompt and the tokens generated for it.

    `generated` ends before the stop token, which is kept in `stop_token`. `logprobs` has one entry per
    generated token, before temperature and filters. `finish_reason` is None until the row has
    finished. `drafted` and `accepted` count the guesses of speculative decoding.
    """

    prompt: list[int]
    max_gen_len: int
    images: Sequence[Tiles] = ()  # at the prompt's image ids, in order
    generated: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    drafted: int = 0
    accepted: int = 0

    def __post_init__(self) -> None:
        if self.max_gen_len == 0:
            self.finish_reason = "length"

    @property
    def total_len(self) -> int:
        """The largest possible number of tokens, prompt included."""
        return len(self.prompt) + self.max_gen_len

    @property
    def passes(self) -> int:
        """Forward passes so far, the prompt's included: one per token that was not an accepted guess."""
        return len(self.generated) + (self.stop_token is not None) - self.accepted

    def take(self, token: int, logprob: float, stop_tokens: Collection[int]) -> None:
        """Append the next token; finish if it is a stop token or the last that fits."""
        if token in stop_tokens:
            self.finish_reason, self.stop_token = "stop", token
            return
        self.generated.append(token)
        self.logprobs.append(logprob)
        if len(self.generated) == self.max_gen_len:
            self.finish_reason = "length"
