"""What each token id stands for, and the native files that say so: `tokenizer.model`, and `added_tokens.json` where needed."""

import json
from binascii import a2b_base64, b2a_base64
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from llama_ref.errors import CheckpointError
from llama_ref.files import read_json, read_small

MAX_FILE_BYTES = 64 << 20  # Llama 3's file is 2 MB; nothing of this kind comes near the limit
MAX_ID = 1 << 24  # a hundred times Llama 3's vocabulary: what is beyond is a damaged number, not a token
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
NEEDED = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
RESERVED_ONCE = ("<|eom_id|>", "<|python_tag|>", "<|finetune_right_pad_id|>")  # Llama 3.0's files have other names for them

ADDED_TOKENS = "added_tokens.json"
ADDED_TOKENS_FORM = 'an object like {"special": {"<|name|>": id, …}, "ordinary": {"text": id, …}}'


@dataclass(frozen=True)
class Vocabulary:
    """Every token and its id.

    ranks: the byte-pair tokens, whose ids are also the order of merging; 0 to n - 1, or with one gap of 256 ids, where the
    special tokens stand before byte pairs that were added later. special: text that only an explicit request makes a token.
    added: ordinary text that is one token wherever it stands, the longest at the leftmost place, whatever surrounds it; its
    bytes may be a byte-pair token's too, with that id or its own.
    """

    ranks: dict[bytes, int]
    special: dict[str, int]
    added: dict[str, int] = field(default_factory=dict)

    @property
    def n_words(self) -> int:
        """How many ids there are: one more than the highest."""
        return 1 + max(max(ids.values(), default=-1) for ids in (self.ranks, self.special, self.added))

    def special_id(self, text: str) -> int:
        """Id of one of Llama 3's special tokens: the token of that text, else the one in its place after begin_of_text."""
        return self.special.get(text, self.special["<|begin_of_text|>"] + SPECIAL_TOKENS.index(text))

    def special_text(self, text: str) -> str:
        """What this vocabulary calls that special token."""
        token_id = self.special_id(text)
        return next(name for name, i in self.special.items() if i == token_id)

    def with_unused(self, n_words: int | None = None) -> "Vocabulary":
        """The same with a special token `<|unused_{id}|>` for each id below `n_words` (default: the highest) that has none."""
        taken = {*self.ranks.values(), *self.special.values(), *self.added.values()}
        n_words = self.n_words if n_words is None else n_words
        unused = {unused_text(i): i for i in range(n_words) if i not in taken}
        return replace(self, special=_by_id(self.special | unused)) if unused else self


def unused_text(token_id: int) -> str:
    """The text of a placeholder: the model has a row for this id, but its tokenizer has no token."""
    return f"<|unused_{token_id}|>"


# Native files


def read_tokenizer_model(path: Path) -> Vocabulary:
    """The vocabulary of a native tokenizer: 256 special tokens after the ranks or in their gap, and `added_tokens.json` beside.

    `added_tokens.json`, if there, gives ids after all others to added tokens, or other texts to some of the 256. Raises
    CheckpointError if either file is damaged or the two do not fit.
    """
    ranks = read_ranks(path)
    start = special_start(ranks)
    special = {text: start + i for i, text in enumerate(SPECIAL_TOKENS)}
    beside = path.with_name(ADDED_TOKENS)
    if not beside.exists():
        return Vocabulary(ranks, special)

    new_special, added = _read_added_tokens(beside)
    renamed = {*new_special.values(), *added.values()}
    kept = {text: i for text, i in special.items() if i not in renamed}
    if text := next((text for text in kept if text in new_special or text in added), None):
        raise CheckpointError(
            f"{beside} gives {text!r} the id {(new_special | added)[text]}, but it is token {kept[text]} of {path.name}: each "
            "text is one token"
        )
    vocabulary = Vocabulary(ranks, _by_id(kept | new_special), _by_id(added))
    check_vocabulary(beside, vocabulary)
    _check_no_gap(beside, vocabulary)
    return vocabulary


def write_tokenizer_model(folder: Path, vocabulary: Vocabulary) -> None:
    """Write `tokenizer.model` into `folder`, and `added_tokens.json` where Llama 3's 256 special tokens are not all there is.

    Every id below `vocabulary.n_words` must have a token (see Vocabulary.with_unused). Raises CheckpointError for a
    vocabulary that the native files cannot hold.
    """
    check_vocabulary(folder, vocabulary)
    start = special_start(vocabulary.ranks)
    default = {start + i: text for i, text in enumerate(SPECIAL_TOKENS)}
    if vocabulary.n_words < start + N_SPECIAL:
        raise CheckpointError(
            f"{folder}: a native tokenizer has {N_SPECIAL} special tokens after its {len(vocabulary.ranks):,} ranks, but this "
            f"vocabulary ends at {vocabulary.n_words:,}: enlarge the model's embedding to {start + N_SPECIAL:,} rows first"
        )
    _check_no_gap(folder, vocabulary)

    in_order = sorted(vocabulary.ranks.items(), key=lambda item: item[1])
    lines = [b"%b %d\n" % (b2a_base64(token, newline=False), rank) for token, rank in in_order]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    sections = {
        "special": _by_id({text: i for text, i in vocabulary.special.items() if default.get(i) != text}),
        "ordinary": _by_id(vocabulary.added),
    }
    beside = folder / ADDED_TOKENS
    if any(sections.values()):
        beside.write_text(json.dumps(sections, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    else:
        beside.unlink(missing_ok=True)  # one that stood here before would be read with the new file


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

    check_ranks(path, ranks)
    return ranks


def special_start(ranks: Mapping[bytes, int]) -> int:
    """The first id of the 256 special tokens: where the ranks have their gap, else after them."""
    taken = set(ranks.values())
    return next(i for i in range(len(ranks) + 1) if i not in taken)


# What must hold of any vocabulary


def check_ranks(path: Path, ranks: Mapping[bytes, int]) -> None:
    """Raise CheckpointError unless the ranks are 0 to n - 1 once each (or leave one gap of 256) and hold every single byte."""
    in_order = sorted(ranks.values())
    gap_start = next((i for i, rank in enumerate(in_order) if i != rank), len(in_order))
    with_gap = [*range(gap_start), *range(gap_start + N_SPECIAL, len(in_order) + N_SPECIAL)]
    if gap_start < len(in_order) and (gap_start == 0 or in_order != with_gap):
        twice = next((a for a, b in pairwise(in_order) if a == b), None)
        fault = f"has no token of rank {gap_start}" if twice is None else f"gives rank {twice} to more than one token"
        raise CheckpointError(
            f"{path} {fault}; its {len(ranks):,} tokens should have the ranks 0 to {len(ranks) - 1}, or leave out exactly "
            f"{N_SPECIAL} for the special tokens. {REFETCH}"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(
            f"{path} has no token for {len(missing)} of the 256 single bytes (the first is 0x{missing[0]:02x}), so not every "
            f"text could be encoded; Llama 3's tokenizer has all of them. {REFETCH}"
        )


def check_vocabulary(path: Path, vocabulary: Vocabulary) -> None:
    """Raise CheckpointError unless each id is one token, each text one id, and Llama 3's special tokens are all there."""
    check_ranks(path, vocabulary.ranks)
    rank_ids = set(vocabulary.ranks.values())
    owner: dict[int, str] = {}
    for text, token_id in (*vocabulary.special.items(), *vocabulary.added.items()):
        if fault := _text_fault(text) or _id_fault(token_id):
            raise CheckpointError(f"{path} has the token {text!r} with id {token_id!r}, but {fault}. {REFETCH}")
        if token_id in owner:
            raise CheckpointError(f"{path} gives id {token_id} to both {owner[token_id]!r} and {text!r}. {REFETCH}")
        owner[token_id] = text
        if token_id in rank_ids and (text not in vocabulary.added or vocabulary.ranks.get(text.encode()) != token_id):
            raise CheckpointError(f"{path} gives {text!r} the id {token_id}, which is a byte-pair token's. {REFETCH}")
    if both := vocabulary.special.keys() & vocabulary.added.keys():
        raise CheckpointError(f"{path} has {min(both)!r} both as a special and as an ordinary token. {REFETCH}")

    if missing := [text for text in NEEDED if text not in vocabulary.special]:
        raise CheckpointError(
            f"{path} has no special token {', '.join(missing)}, which Llama 3's texts and dialogs need: it is not Llama 3's "
            "tokenizer, or these tokens were renamed"
        )
    special_ids = set(vocabulary.special.values())
    if missing := [text for text in RESERVED_ONCE if vocabulary.special_id(text) not in special_ids]:
        raise CheckpointError(
            f"{path} has no special token {missing[0]}, nor another one in its place (id "
            f"{vocabulary.special_id(missing[0])}): it is not Llama 3's tokenizer"
        )


def _check_no_gap(path: Path, vocabulary: Vocabulary) -> None:
    taken = {*vocabulary.ranks.values(), *vocabulary.special.values(), *vocabulary.added.values()}
    if len(taken) != vocabulary.n_words:
        absent = next(i for i in range(vocabulary.n_words) if i not in taken)
        raise CheckpointError(
            f"{path} has no token of id {absent}, though others go up to {vocabulary.n_words - 1}: a native tokenizer names "
            f"each one, also those not in use (such as {unused_text(absent)!r})"
        )


def _text_fault(text: str) -> str | None:
    if not text:
        return "an empty text would be found everywhere"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "half a surrogate pair is not text"
    return None


def _id_fault(token_id: object) -> str | None:
    if type(token_id) is not int or not 0 <= token_id < MAX_ID:
        return f"an id is a whole number from 0 to {MAX_ID - 1:,}"
    return None


def _read_added_tokens(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """The special and the ordinary tokens of added_tokens.json."""
    content = read_json(path, MAX_FILE_BYTES, ADDED_TOKENS_FORM)
    if not isinstance(content, dict) or not all(
        name in ("special", "ordinary") and isinstance(tokens, dict) for name, tokens in content.items()
    ):
        raise CheckpointError(
            f"{path}, which stands beside a tokenizer.model, is not {ADDED_TOKENS_FORM}. If it was made by Hugging Face's "
            "library, take its tokenizer.json, which says what its tokens are, and remove this file"
        )
    special, ordinary = content.get("special", {}), content.get("ordinary", {})
    for text, token_id in (*special.items(), *ordinary.items()):
        if fault := _id_fault(token_id):
            raise CheckpointError(f"{path} gives {text!r} the id {token_id!r}, but {fault}. {REFETCH}")
    return special, ordinary


def _by_id(ids: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(ids.items(), key=lambda item: item[1]))


def _bad_line(path: Path, number: int, line: bytes, fault: str) -> CheckpointError:
    shown = ascii(line[:60].decode("latin-1")) + ("…" if len(line) > 60 else "")
    return CheckpointError(f"{path}, line {number}, {fault}: {shown}, so it is not {EXPECTED}. {REFETCH}")
