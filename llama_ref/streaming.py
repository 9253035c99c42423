"""Text as it is made, in pieces that are safe to print."""

from collections.abc import Iterator

from llama_ref.errors import RequestError
from llama_ref.loop import FinishReason, Row
from llama_ref.tokenizer import StreamDecoder, Tokenizer


class Stream(Iterator[str]):
    """Pieces of one answer. Joined they are `text`; none holds half a character, or the beginning of a stop string.

    After the last piece `finish_reason` is "stop" (a stop token or string) or "length". It may be left at any point.
    """

    def __init__(self, row: Row, steps: Iterator[None], tokenizer: Tokenizer, stop: list[str]):
        if not all(isinstance(string, str) and string for string in stop):
            raise RequestError(f"stop is {stop!r}, expected strings that are not empty")
        self.row = row
        self.text = ""
        self._stopped_by_string = False
        self._pieces = self._make_pieces(steps, StreamDecoder(tokenizer), stop)

    @property
    def tokens(self) -> list[int]:
        """Ids generated so far, those of a stop string included."""
        return self.row.generated

    @property
    def finish_reason(self) -> FinishReason | None:
        return "stop" if self._stopped_by_string else self.row.finish_reason

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def close(self) -> None:
        """Make no more of it."""
        self._pieces.close()

    def _make_pieces(self, steps: Iterator[None], decoder: StreamDecoder, stop: list[str]) -> Iterator[str]:
        held = ""  # made, but it might be the beginning of a stop string
        seen = 0
        for _ in steps:
            held += "".join(decoder.feed(token) for token in self.row.generated[seen:])
            seen = len(self.row.generated)
            if self.row.finish_reason:
                held += decoder.flush()
            cut = _first_of(stop, held)
            if cut is not None:
                self._stopped_by_string = True
                held = held[:cut]
                break
            keep = 0 if self.row.finish_reason else _longest_beginning(stop, held)
            ready, held = held[: len(held) - keep], held[len(held) - keep :]
            if ready:
                yield ready
        if held:
            yield held


def _first_of(stop: list[str], text: str) -> int | None:
    """Where the earliest stop string begins in `text`."""
    return min((at for at in map(text.find, stop) if at >= 0), default=None)


def _longest_beginning(stop: list[str], text: str) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    lengths = range(min(len(text), max(map(len, stop), default=1) - 1), 0, -1)
    return next((n for n in lengths if any(string.startswith(text[-n:]) for string in stop)), 0)
