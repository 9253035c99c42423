"""Streamed text, in pieces that are safe to print."""

from collections.abc import Generator, Iterator, Sequence

from llama_ref.decoding.loop import FinishReason, Row
from llama_ref.errors import RequestError
from llama_ref.tokenizer import StreamDecoder, Tokenizer


class Stream(Iterator[str]):
    """Pieces of one answer, which joined are `text`. None holds half a character or part of a stop string.

    After the last piece `finish_reason` is "stop" (a stop token or string) or "length". Iteration may
    be abandoned at any point.
    """

    def __init__(self, row: Row, steps: Iterator[None], tokenizer: Tokenizer, stop: str | Sequence[str] = ()):
        self.row = row
        self.text = ""
        self._stopped_by_string = False
        self._pieces = self._make_pieces(steps, StreamDecoder(tokenizer), stop_strings(stop))

    @property
    def tokens(self) -> list[int]:
        """Ids generated so far, including those of a stop string."""
        return self.row.generated

    @property
    def finish_reason(self) -> FinishReason | None:
        return "stop" if self._stopped_by_string else self.row.finish_reason

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def close(self) -> None:
        """End the generation; the iterator yields no more."""
        self._pieces.close()

    def _make_pieces(self, steps: Iterator[None], decoder: StreamDecoder, stop: list[str]) -> Generator[str, None, None]:
        held = ""  # generated, but perhaps the beginning of a stop string
        seen = 0
        for _ in steps:
            held += "".join(decoder.feed(token) for token in self.row.generated[seen:])
            seen = len(self.row.generated)
            if self.row.finish_reason:
                held += decoder.flush()
            cut = _begin_of_first(stop, held)
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


def stop_strings(stop: str | Sequence[str]) -> list[str]:
    """One stop string or several, as a list. Raises RequestError for anything else."""
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(string, str) and string for string in strings):
        raise RequestError(f"stop is {stop!r}, expected a non-empty string or a list of them")
    return list(strings)


def _begin_of_first(stop: list[str], text: str) -> int | None:
    """Start of the stop string that is complete first, the longest of several, however the text was tokenized."""
    found = [(text.find(string) + len(string), text.find(string)) for string in stop if string in text]
    return min(found)[1] if found else None


def _longest_beginning(stop: list[str], text: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of a stop string."""
    lengths = range(min(len(text), max(map(len, stop), default=1) - 1), 0, -1)
    return next((n for n in lengths if any(string.startswith(text[-n:]) for string in stop)), 0)
