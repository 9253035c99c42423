"""How fast a text is made."""

import time
from collections.abc import Iterable

from llama_ref.decoding.stream import Stream


class Pace:
    """Watches a stream go by, to say afterwards how fast it was."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self.begin = self.end = time.perf_counter()
        self.first: float | None = None

    def __iter__(self) -> Iterable[str]:
        for piece in self.stream:
            self.end = time.perf_counter()
            self.first = self.first or self.end
            yield piece
        self.end = time.perf_counter()

    def __str__(self) -> str:
        """The first token's time is the prompt's; the rate counts those after it."""
        made, asked = len(self.stream.tokens), len(self.stream.row.prompt)
        wait = f", first token after {self.first - self.begin:.2f} s" if self.first else ""
        timed = made > 1 and self.first and self.end > self.first
        rate = f", {(made - 1) / (self.end - self.first):.1f} tokens/s" if timed else ""
        reason = self.stream.finish_reason or "broken off"
        return f"[{asked} tokens in{wait}; {made} out{rate}; {reason}]"
