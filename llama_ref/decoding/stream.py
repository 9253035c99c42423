"""Stream text in pieces that are safe to print, up to a stop string."""

from collections.abc import Iterator, Sequence

from llama_ref.decoding.row import FinishReason, Row
from llama_ref.errors import RequestError
from llama_ref.tokenizer import StreamDecoder, Tokenizer


class RowText:
    """The text of a row while it is generated. The row finishes at the first stop string, which is cut off."""

    def __init__(self, row: Row, tokenizer: Tokenizer, stop: str | Sequence[str] = ()):
        self.row, self.tokenizer = row, tokenizer
        self.text = ""
        self._stop = stop_strings(stop)
        self._decoder = StreamDecoder(tokenizer)
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self._n_read = 0
        self.ends_at_stop_string = False

    def read(self) -> str:
        """Text of the row's new tokens, without half characters or parts of a stop string."""
        self._held += "".join(self._decoder.feed(token) for token in self.row.generated[self._n_read :])
        self._n_read = len(self.row.generated)
        if self.row.finish_reason:
            self._held += self._decoder.flush()
        stop = _first_stop(self._stop, self._held)
        if stop is not None:
            self.row.finish_reason, self.ends_at_stop_string = "stop", True
            self._held = self._held[:stop]
        keep = 0 if self.row.finish_reason else _longest_beginning(self._stop, self._held)
        piece, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += piece
        return piece

    def whole(self) -> str:
        """The text of a row that has finished."""
        self.read()
        return self.text

    @property
    def tokens(self) -> list[int]:
        """The ids of `text`: without those of a stop string or an incomplete character."""
        n = len(self.row.generated)
        while len(self.tokenizer.decode(self.row.generated[:n])) > len(self.text):
            n -= 1
        return self.row.generated[:n]

    @property
    def answer_tokens(self) -> list[int]:
        """The ids of `text`, and the stop token if one ended it: a message's ids as generated."""
        stop = self.row.stop_token
        return self.tokens if stop is None or self.ends_at_stop_string else [*self.row.generated, stop]


class Stream(Iterator[str]):
    """An iterator of the pieces of one answer's `text`.

    No piece contains half a character or part of a stop string. After the last piece,
    `finish_reason` is "stop" (a stop token or string) or "length". Iteration may be abandoned at
    any point.
    """

    def __init__(self, row_text: RowText, steps: Iterator[None], logprobs: bool = False):
        self.row = row_text.row
        self._row_text = row_text
        self._steps = steps
        self._logprobs = logprobs
        self._is_closed = False

    @property
    def text(self) -> str:
        return self._row_text.text

    @property
    def tokens(self) -> list[int]:
        """Ids generated so far, including those of a stop string."""
        return self.row.generated

    @property
    def shown_tokens(self) -> list[int]:
        """Ids of `text`: without those of a stop string or an incomplete character."""
        return self._row_text.tokens

    @property
    def answer_tokens(self) -> list[int]:
        """`shown_tokens`, and the stop token if one ended the answer: what `decode_assistant_message` reads."""
        return self._row_text.answer_tokens

    @property
    def logprobs(self) -> list[float] | None:
        """The model's log-probability of each of `tokens`; None unless asked for."""
        return self.row.logprobs if self._logprobs else None

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.row.finish_reason

    def __next__(self) -> str:
        while not self._is_closed:
            if self.row.finish_reason or next(self._steps, self) is self:
                self.close()
            if piece := self._row_text.read():
                return piece
        raise StopIteration

    def close(self) -> None:
        """End the generation and release its memory; the iterator yields nothing more."""
        self._is_closed = True
        self._steps = iter(())  # a generator can be neither copied nor pickled


def stop_strings(stop: str | Sequence[str]) -> list[str]:
    """One stop string or several, as a list. Raises RequestError for anything else."""
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(string, str) and string for string in strings):
        raise RequestError(f"stop is {stop!r}, expected a non-empty string or a list of them")
    return list(strings)


def _first_stop(stop: list[str], text: str) -> int | None:
    """Start of the stop string that ends first (the longest of several that end there)."""
    found = [(text.find(string) + len(string), text.find(string)) for string in stop if string in text]
    return min(found)[1] if found else None


def _longest_beginning(stop: list[str], text: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of a stop string."""
    lengths = range(min(len(text), max(map(len, stop), default=1) - 1), 0, -1)
    return next((n for n in lengths if any(string.startswith(text[-n:]) for string in stop)), 0)
