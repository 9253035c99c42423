"""Text to token ids and back: Llama 3's byte-level BPE, with the ids of Meta's tokenizer on any input."""

import codecs
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import tiktoken

from llama_ref.checkpoint.hf.tokenizer import read_tokenizer_json
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.vocabulary import (
    MAX_FILE_BYTES,
    MAX_ID,
    N_SPECIAL,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    Vocabulary,
    read_ranks,
    read_tokenizer_model,
    write_tokenizer_model,
)

__all__ = [  # the vocabulary's names too: whoever needs them need not know which file they live in
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

# tiktoken panics on very long strings and very long runs. Meta cuts both at these lengths (characters), and a cut can
# change the ids around it, so the same lengths are part of giving the same ids.
MAX_PIECE = 400_000
MAX_RUN = 25_000
RUN = re.compile(r"\s+|\S+")


class Tokenizer:
    """Llama 3's tokenizer, read from Meta's `tokenizer.model` or, where the file's name ends in .json, Hugging Face's.

    special_tokens maps each special token's text to its id; n_words counts all ids (128,256 in Meta's file); stop_tokens are
    the ids that end a generation. `n_words`, the model's number of rows, is for a tokenizer.json alone: fine-tunes pad their
    embedding, so ids without a token become special tokens `<|unused_{id}|>`. Raises CheckpointError if the file is anything
    else, or holds more ids than that.
    """

    def __init__(self, path: str | Path, n_words: int | None = None) -> None:
        path = Path(path)
        if path.suffix == ".json":
            self.vocabulary = _padded(path, read_tokenizer_json(path), n_words)
        else:
            self.vocabulary = read_tokenizer_model(path)
        self.special_tokens = self.vocabulary.special
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=SPLIT_PATTERN, mergeable_ranks=self.vocabulary.ranks, special_tokens=self.special_tokens
        )
        self._added = TextFinder(self.vocabulary.added)
        self._bytes_of = _bytes_of(self.vocabulary)  # id -> bytes

        self.n_words = self.vocabulary.n_words
        self.bos_id = self.vocabulary.special_id("<|begin_of_text|>")
        self.eos_id = self.vocabulary.special_id("<|end_of_text|>")
        self.eot_id = self.vocabulary.special_id("<|eot_id|>")
        self.eom_id = self.vocabulary.special_id("<|eom_id|>")
        self.pad_id = self.vocabulary.special_id("<|finetune_right_pad_id|>")
        self.python_tag_id = self.vocabulary.special_id("<|python_tag|>")
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
        """Token ids of `s`, with begin_of_text before and end_of_text after if asked for.

        The text of a special token is ordinary text, unless `allowed_special` names it (then it becomes that token) or
        `disallowed_special` does (then RequestError). "all" stands for all of them; disallowed "all" leaves out the allowed.
        A lone surrogate is encoded as U+FFFD, a surrogate pair as its character.
        """
        if not isinstance(s, str):
            raise RequestError(f"only a str can be encoded, got {type(s).__name__}; encode the texts of a list one by one")
        allowed = self._special_names("allowed_special", allowed_special or ())
        disallowed = self._special_names("disallowed_special", disallowed_special)
        if disallowed_special == "all":
            disallowed -= allowed

        ids = [self.bos_id] if bos else []
        for text, token_after in self._around_added(s, allowed):
            for piece in pieces(text):
                if found := next((name for name in disallowed if name in piece), None):
                    raise RequestError(
                        f"the text holds {found}, which disallowed_special refuses: name it in allowed_special to encode it "
                        "as that special token, or leave disallowed_special empty to encode it as text"
                    )
                ids += self._encoding.encode(piece, allowed_special=allowed, disallowed_special=())
            if token_after is not None:
                ids.append(token_after)
        if eos:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of `ids`, exactly. Raises RequestError for an id outside the vocabulary."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token, often only a part of a character. Raises RequestError for an id outside the vocabulary."""
        try:
            if token_id >= 0:  # a negative index would count from the end
                return self._bytes_of[token_id]
        except (IndexError, TypeError):
            pass
        raise RequestError(
            f"{token_id!r} is not a token id: this vocabulary has {self.n_words:,} tokens, ids 0 to {self.n_words - 1}"
        )

    def _around_added(self, s: str, allowed: set[str]) -> Iterator[tuple[str, int | None]]:
        """`s` in turns: ordinary text, and the id of the added token after it. Special tokens go before added ones."""
        if not self.vocabulary.added:
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
        if isinstance(names, str):  # would be taken for a set of single characters
            raise RequestError(f'{argument} must be "all" or a set of special tokens, got {names!r}: write {{{names!r}}}')
        return set(names)


class StreamDecoder:
    """Text of token ids as they come. No piece ends within a character; joined, they are `tokenizer.decode` of all the ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The text that this token completes: "" while a character is still short of bytes."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed, else "". Ready for another text after."""
        return self._utf8.decode(b"", final=True)


class TextFinder:
    """Finds any of many texts in a string: leftmost first, the longest at each place; 20,000 texts take no longer than ten."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids
        self._lengths: dict[str, list[int]] = {}  # of the texts by first character, longest first
        for first, length in sorted({(text[0], len(text)) for text in ids}, reverse=True):
            self._lengths.setdefault(first, []).append(length)
        self._first = re.compile(f"[{re.escape(''.join(self._lengths))}]") if ids else None

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """What stands before each text that is found, with that text's id; then what is left, with None."""
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


def pieces(text: str, max_piece: int = MAX_PIECE, max_run: int = MAX_RUN) -> Iterator[str]:
    """Cut `text` into strings that tiktoken survives: joined they are `text`, none too long, none with too long a run."""
    for start in range(0, len(text), max_piece):
        yield from cut_runs(text[start : start + max_piece], max_run)


def cut_runs(text: str, limit: int) -> Iterator[str]:
    """Cut `text` within each run of whitespace or of non-whitespace longer than `limit`, every `limit` characters.

    Such a run covers a multiple of `limit`, so only the runs at those few positions are measured.
    """
    cut_before = run_end = 0
    for position in range(limit, len(text), limit):
        if position < run_end:
            continue  # still within the run just cut
        backwards = text[position - limit : position + 1][::-1]
        run_start = position + 1 - _run_end(backwards)
        run_end = _run_end(text, position)
        for cut in range(run_start + limit, run_end, limit):
            yield text[cut_before:cut]
            cut_before = cut
    yield text[cut_before:]


def _run_end(text: str, start: int = 0) -> int:
    """Where the run of whitespace or of non-whitespace that begins at `start` ends."""
    run = RUN.match(text, start)
    return run.end() if run else start


def _padded(path: Path, vocabulary: Vocabulary, n_words: int | None) -> Vocabulary:
    """The vocabulary with `n_words` ids, those without a token unused."""
    if n_words is not None and not vocabulary.n_words <= n_words <= MAX_ID:
        last = next(text for text, i in _texts(vocabulary) if i == vocabulary.n_words - 1)
        raise CheckpointError(
            f"{path} has {vocabulary.n_words:,} ids (the last is {last!r}), but the model has {n_words:,} rows: the tokenizer "
            "belongs to another model, or got tokens that the model's embedding was not enlarged for"
        )
    return vocabulary.with_unused(n_words)


def _texts(vocabulary: Vocabulary) -> Iterator[tuple[bytes | str, int]]:
    yield from vocabulary.ranks.items()
    yield from vocabulary.special.items()
    yield from vocabulary.added.items()


def _bytes_of(vocabulary: Vocabulary) -> list[bytes]:
    """The bytes of every id, in order."""
    by_id = {i: text if isinstance(text, bytes) else text.encode() for text, i in _texts(vocabulary)}
    return [by_id[i] for i in range(vocabulary.n_words)]
