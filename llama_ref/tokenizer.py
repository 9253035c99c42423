"""Text to token ids and back: Llama 3's byte-level BPE, with the ids of Meta's tokenizer on any input."""

import codecs
import re
from binascii import a2b_base64, b2a_base64
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal

import tiktoken

from llama_ref.errors import CheckpointError, RequestError
from llama_ref.files import read_small

MAX_FILE_BYTES = 64 << 20  # Llama 3's file is 2 MB; nothing of this kind comes near the limit
EXPECTED = "a Llama 3 tokenizer.model"
REFETCH = "The file is damaged or another model's: fetch it again"

# How text is cut before byte pairs are merged. Part of the trained model: another pattern gives other ids.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

N_SPECIAL = 256
NAMED_SPECIAL = (
    "begin_of_text",
    "end_of_text",
    "reserved_special_token_0",
    "reserved_special_token_1",
    "finetune_right_pad_id",
    "step_id",
    "start_header_id",
    "end_header_id",
    "eom_id",
    "eot_id",
    "python_tag",
    "image",
)
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in NAMED_SPECIAL) + tuple(
    f"<|reserved_special_token_{i}|>" for i in range(2, 2 + N_SPECIAL - len(NAMED_SPECIAL))
)

# tiktoken panics on very long strings and very long runs. Meta cuts both at these lengths (characters), and a cut can
# change the ids around it, so the same lengths are part of giving the same ids.
MAX_PIECE = 400_000
MAX_RUN = 25_000
RUN = re.compile(r"\s+|\S+")


class Tokenizer:
    """Llama 3's tokenizer, read from `tokenizer.model`: `base64-token rank` per line, then 256 special tokens after the ranks.

    special_tokens maps each special token's text to its id; n_words counts ranks and special tokens (128,256 in Meta's file);
    stop_tokens are the ids that end a generation. Raises CheckpointError if the file is anything else.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        ranks = read_ranks(path)
        self.special_tokens = {text: len(ranks) + i for i, text in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )
        self._bytes_of = sorted(ranks, key=ranks.__getitem__) + [text.encode() for text in SPECIAL_TOKENS]  # id -> bytes

        self.n_words = len(self._bytes_of)
        self.bos_id = self.special_tokens["<|begin_of_text|>"]
        self.eos_id = self.special_tokens["<|end_of_text|>"]
        self.eot_id = self.special_tokens["<|eot_id|>"]
        self.eom_id = self.special_tokens["<|eom_id|>"]
        self.pad_id = self.special_tokens["<|finetune_right_pad_id|>"]
        self.python_tag_id = self.special_tokens["<|python_tag|>"]
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
        `disallowed_special` does (then RequestError). "all" stands for all 256; disallowed "all" leaves out the allowed ones.
        A lone surrogate is encoded as U+FFFD, a surrogate pair as its character.
        """
        if not isinstance(s, str):
            raise RequestError(f"only a str can be encoded, got {type(s).__name__}; encode the texts of a list one by one")
        allowed = self._special_names("allowed_special", allowed_special or ())
        disallowed = self._special_names("disallowed_special", disallowed_special)
        if disallowed_special == "all":
            disallowed -= allowed

        ids = [self.bos_id] if bos else []
        for piece in pieces(s):
            if found := next((name for name in disallowed if name in piece), None):
                raise RequestError(
                    f"the text holds {found}, which disallowed_special refuses: name it in allowed_special to encode it as "
                    "that special token, or leave disallowed_special empty to encode it as text"
                )
            ids += self._encoding.encode(piece, allowed_special=allowed, disallowed_special=())
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
        run_start = position + 1 - RUN.match(backwards).end()
        run_end = RUN.match(text, position).end()
        for cut in range(run_start + limit, run_end, limit):
            yield text[cut_before:cut]
            cut_before = cut
    yield text[cut_before:]


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank, from a tiktoken file. Raises CheckpointError, with the line, unless ranks and bytes are complete."""
    data = read_small(path, MAX_FILE_BYTES, EXPECTED)
    if data.startswith(b"\n") and b"\0" in data[:512]:
        raise CheckpointError(
            f"{path} is a SentencePiece model, as Llama 2 and older models use, not {EXPECTED}, which is text with "
            "`base64-token rank` lines: take the tokenizer.model that was released with the Llama 3 checkpoint"
        )

    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2:
            raise _bad_line(path, number, line, "is not `base64-token rank`")
        try:
            token = a2b_base64(fields[0])
        except ValueError:
            token = b""
        if b2a_base64(token, newline=False) != fields[0]:  # a2b_base64 alone skips over characters it does not know
            raise _bad_line(path, number, line, "does not begin with valid base64")
        if not fields[1].isdigit() or len(fields[1]) > 9:
            raise _bad_line(path, number, line, "does not end in a rank (a whole number, 0 or more)")
        if token in ranks:
            raise _bad_line(path, number, line, f"repeats the token of rank {ranks[token]}")
        ranks[token] = int(fields[1])

    _check_complete(path, ranks)
    return ranks


def _check_complete(path: Path, ranks: dict[bytes, int]) -> None:
    """Raise CheckpointError unless the ranks are 0 to n - 1, once each, and every single byte is a token."""
    in_order = sorted(ranks.values())
    if in_order != list(range(len(ranks))):
        twice = next((a for a, b in pairwise(in_order) if a == b), None)
        if twice is not None:
            fault = f"gives rank {twice} to more than one token"
        else:
            fault = f"has no token of rank {next(i for i, rank in enumerate(in_order) if i != rank)}"
        raise CheckpointError(
            f"{path} {fault}; its {len(ranks):,} tokens should have the ranks 0 to {len(ranks) - 1}. {REFETCH}"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(
            f"{path} has no token for {len(missing)} of the 256 single bytes (the first is 0x{missing[0]:02x}), so not every "
            f"text could be encoded; {EXPECTED} has all of them. {REFETCH}"
        )


def _bad_line(path: Path, number: int, line: bytes, fault: str) -> CheckpointError:
    shown = ascii(line[:60].decode("latin-1")) + ("…" if len(line) > 60 else "")
    return CheckpointError(f"{path}, line {number}, {fault}: {shown}, so it is not {EXPECTED}. {REFETCH}")
