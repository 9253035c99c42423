"""Measure how fast a text is generated."""

import os
import sys
import time
from collections.abc import Iterator

import torch

from llama_ref.decoding.stream import Stream
from llama_ref.machine.busy import OtherPrograms


class Timing:
    """Passes a stream's text through and measures its speed, which `str` formats."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self.begin = self.end = time.perf_counter()
        self.first: float | None = None
        self._others = OtherPrograms()

    def __iter__(self) -> Iterator[str]:
        for piece in self.stream:
            self.end = time.perf_counter()
            self.first = self.first or self.end
            yield piece
        self.end = time.perf_counter()

    def hint(self, device: torch.device) -> str | None:
        """Return advice if other programs slowed this down, on a CPU and at a terminal; else None."""
        is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
        if device.type != "cpu" or not is_alone or not sys.stderr.isatty():
            return None
        hint = self._others.hint(torch.get_num_threads())
        return hint and f"({hint})"

    def __str__(self) -> str:
        """Format the counts and speed; the rate counts the tokens after the first."""
        made, asked = len(self.stream.tokens), len(self.stream.row.prompt)
        words = [f"[{asked} tokens in"]
        if self.first:
            words.append(f", first token after {self.first - self.begin:.2f} s")
        words.append(f"; {made} out")
        if made > 1 and self.first and self.end > self.first:
            words.append(f", {(made - 1) / (self.end - self.first):.1f} tokens/s")
        return "".join([*words, f"; {self.stream.finish_reason or 'interrupted'}]"])
