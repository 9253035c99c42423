"""Llama 3's tokenizer: byte-level BPE that gives the ids of Meta's tokenizer on any input."""

import codecs
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import tiktoken

from llama_ref.checkpoint.hf.tokenizer import read_tokenizer_json
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.formatting import printable
from llama_ref.vocabulary import (
    MAX_FILE_BYTES,
    MAX_ID,
    N_SPECIAL,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    Vocabulary,
    dropped_tokens,
    padded,
    read_ranks,
    read_tokenizer_model,
    unused_text,
    write_tokenizer_model,
)

__all__ = [  # re-exports the public names of llama_ref.vocabulary
    "MAX_FILE_BYTES",
    "N_SPECIAL",
    "SPECIAL_TOKENS",
    "SPLIT_PATTERN",
    "StreamDecoder",
    "Tokenizer",
    "Vocabulary",
    "read_ranks",
    "read_tokenizer_model",
    "write_tokenizer_model",
]

# tiktoken panics on very long strings and runs. Meta splits both at these lengths (characters). A
# split can change the ids around it, so the lengths must be the same.
MAX_PIECE = 400_000
MAX_RUN = 25_000
logger = logging.getLogger(__name__)

RUN = re.compile(r"\s+|\S+")


class Tokenizer:
    """Llama 3's tokenizer, from Meta's `tokenizer.model` or Hugging Face's `tokenizer.json`.

    special_tokens maps each special token's text to its id. n_words is the number of ids (128,256
    in Meta's file). stop_tokens are the ids that end a generation. The argument `n_words` is the
    model's number of embedding rows and only used for a tokenizer.json: fine-tunes pad the
    embedding, so ids without a token become special tokens `<|unused_{id}|>`. Added special tokens
    with ids beyond `n_words`, such as a padding token, are dropped with a warning. Raises
    CheckpointError if the file is something else or has other ids beyond `n_words`.
    """

    def __init__(self, path: str | Path, n_words: int | None = None) -> None:
        path = Path(path)
        if path.suffix == ".json":
            self.vocabulary = _padded(path, read_tokenizer_json(path), n_words)
        else:
            self.vocabulary = read_tokenizer_model(path)
        self.special_tokens = self.vocabulary.special
        # Placeholders of unused ids would cost tiktoken 5 kB each, for tokens that no text
        # contains.
        self._placeholders = {text for text, i in self.special_tokens.items() if text == unused_text(i)}
        used = {text: i for text, i in self.special_tokens.items() if text not in self._placeholders}
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=SPLIT_PATTERN, mergeable_ranks=self.vocabulary.ranks, special_tokens=used
        )
        self._added = TextFinder(self.vocabulary.added)
        self._special = TextFinder(self.special_tokens)
        self._bytes_of = _bytes_of(self.vocabulary)  # id -> bytes

        self.n_words = self.vocabulary.n_words
        self.bos_id = self.vocabulary.special_id("<|begin_of_text|>")
        self.eos_id = self.vocabulary.special_id("<|end_of_text|>")
        self.eot_id = self.vocabulary.special_id("<|eot_id|>")
        self.eom_id = self.vocabulary.special_id("<|eom_id|>")
        self.pad_id = self.vocabulary.special_id("<|finetune_right_pad_id|>")
        self.python_tag_id = self.vocabulary.special_id("<|python_tag|>")
        # A folder may name more (CheckpointFolder.open_tokenizer).
        self.stop_tokens = [self.eos_id, self.eom_id, self.eot_id]

    def encode(
        self,
        s: str,
        *,
        bos: bool,
        eos: bool,
        allowed_special: Literal["all"] | Collection[str] | None = None,
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Token ids of `s`, with begin_of_text before it (`bos`) and end_of_text after it (`eos`).

        The text of a special token is encoded as ordinary text, unless it is in `allowed_special`
        (encoded as that token) or `disallowed_special` (RequestError). "all" means all special
        tokens; for `disallowed_special`, all that are not allowed. A lone surrogate is encoded as
        U+FFFD, a surrogate pair as its character.
        """
        if not isinstance(s, str):
            raise RequestError(f"only a str can be encoded, got {type(s).__name__}; encode the texts of a list one by one")
        allowed = self._special_names("allowed_special", allowed_special or ())
        disallowed = self._special_names("disallowed_special", disallowed_special)
        if disallowed_special == "all":
            disallowed -= allowed

        ids = [self.bos_id] if bos else []
        for text, token_after in self._split_added(s, allowed):
            for piece in split_long(text):
                if found := next((name for name in disallowed if name in piece), None):
                    raise RequestError(
                        f"the text contains {found}, which disallowed_special rejects: name it in allowed_special to encode it "
                        "as that special token, or leave disallowed_special empty to encode it as text"
                    )
                ids += self._encoding.encode(piece, allowed_special=allowed, disallowed_special=())
            if token_after is not None:
                ids.append(token_after)
        if eos:
            ids.append(self.eos_id)
        return ids

    def special_in(self, text: str) -> list[str]:
        """The special tokens that `text` spells, each once, in order."""
        names = {token_id: name for name, token_id in self.special_tokens.items()}
        found = (token_id for _, token_id in self._special.split(text))
        return list(dict.fromkeys(names[token_id] for token_id in found if token_id is not None))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, including special tokens; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Exact bytes of `ids`. Raises RequestError for an id outside the vocabulary."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token, often part of a character. Raises RequestError for an unknown id."""
        try:
            if token_id >= 0:  # a negative index would count from the end
                return self._bytes_of[token_id]
        except (IndexError, TypeError):
            pass
        raise RequestError(
            f"{token_id!r} is not a token id: this vocabulary has {self.n_words:,} tokens, ids 0 to {self.n_words - 1}"
        )

    def _split_added(self, s: str, allowed: set[str]) -> Iterator[tuple[str, int | None]]:
        """Split `s` into (text, id of the added or special token after it); special tokens win."""
        if not self.vocabulary.added and allowed.isdisjoint(self._placeholders):  # tiktoken finds the others
            yield s, None
            return
        special = TextFinder({text: i for text, i in self.special_tokens.items() if text in allowed})
        for text, special_after in special.split(s):
            *before, (rest, _) = self._added.split(text)
            yield from before
            yield rest, special_after

    def _special_names(self, argument: str, names: Collection[str]) -> set[str]:
        if names == "all":
            return set(self.special_tokens)
        if isinstance(names, str):  # it would be taken as a set of characters
            raise RequestError(f'{argument} must be "all" or a set of special tokens, got {names!r}: write {{{names!r}}}')
        return set(names)


class StreamDecoder:
    """Decode a stream of token ids into text, holding back incomplete characters.

    The returned texts join to `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is incomplete."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """End the text: U+FFFD for an incomplete character, else "". Resets the decoder."""
        return self._utf8.decode(b"", final=True)


class TextFinder:
    """Finds texts in a string, leftmost and longest first, in time independent of their number."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids
        self._lengths: dict[str, list[int]] = {}  # by first character, longest first
        for first, length in sorted({(text[0], len(text)) for text in ids}, reverse=True):
            self._lengths.setdefault(first, []).append(length)
        self._first = re.compile(f"[{re.escape(''.join(self._lengths))}]") if ids else None

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Yield (text before the match, its id) for each match, then (remaining text, None)."""
        start = position = 0
        while self._first and (candidate := self._first.search(text, position)):
            position = candidate.start()
            for length in self._lengths[text[position]]:
                token_id = self._ids.get(text[position : position + length])
                if token_id is not None:
                    yield text[start:position], token_id
                    start = position = position + length
                    break
            else:
                position += 1
        yield text[start:], None


def split_long(text: str, max_piece: int = MAX_PIECE, max_run: int = MAX_RUN) -> Iterator[str]:
    """Split `text` into strings that are short enough for tiktoken, as are the runs in them."""
    for start in range(0, len(text), max_piece):
        yield from split_runs(text[start : start + max_piece], max_run)


def split_runs(text: str, limit: int) -> Iterator[str]:
    """Split each run of whitespace or non-whitespace longer than `limit` every `limit` characters.

    Such a run covers a multiple of `limit`, so only the runs at these positions are measured.
    """
    cut_before = run_end = 0
    for position in range(limit, len(text), limit):
        if position < run_end:
            continue  # within the run just split
        backwards = text[position - limit : position + 1][::-1]
        run_start = position + 1 - _run_end(backwards)
        run_end = _run_end(text, position)
        for cut in range(run_start + limit, run_end, limit):
            yield text[cut_before:cut]
            cut_before = cut
    yield text[cut_before:]


def _run_end(text: str, start: int = 0) -> int:
    """End of the run of whitespace or non-whitespace that begins at `start`."""
    run = RUN.match(text, start)
    return run.end() if run else start


def _padded(path: Path, vocabulary: Vocabulary, n_words: int | None) -> Vocabulary:
    """The vocabulary with `n_words` ids; ids without a token become placeholders."""
    if n_words is not None and (beyond := vocabulary.beyond(n_words)):
        vocabulary = vocabulary.without_beyond(n_words)
        logger.warning("%s", printable(f"{path}: {dropped_tokens(beyond, n_words)}"))
    if n_words is not None and not vocabulary.n_words <= n_words <= MAX_ID:
        last = next(text for text, i in _texts(vocabulary) if i == vocabulary.n_words - 1)
        raise CheckpointError(
            f"{path} has {vocabulary.n_words:,} ids (the last is {last!r}), but the model has {n_words:,} rows: the tokenizer "
            "belongs to another model, or has new tokens for which the model's embedding was not enlarged"
        )
    return padded(path, vocabulary, vocabulary.n_words if n_words is None else n_words)


def _texts(vocabulary: Vocabulary) -> Iterator[tuple[bytes | str, int]]:
    yield from vocabulary.ranks.items()
    yield from vocabulary.special.items()
    yield from vocabulary.added.items()


def _bytes_of(vocabulary: Vocabulary) -> list[bytes]:
    """The bytes of every id, in order."""
    by_id = {i: text if isinstance(text, bytes) else text.encode() for text, i in _texts(vocabulary)}
    return [by_id[i] for i in range(vocabulary.n_words)]
