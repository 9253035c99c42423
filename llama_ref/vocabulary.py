"""A tokenizer's vocabulary, and its files in Meta's format: tokenizer.model, added_tokens.json."""

import json
from binascii import a2b_base64, b2a_base64
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from llama_ref.errors import CheckpointError, UnsupportedModel
from llama_ref.files import read_json, read_small
from llama_ref.formatting import comma_list

MAX_FILE_BYTES = 64 << 20  # Llama 3's file is 2 MB
MAX_ID = 1 << 24  # a hundred times Llama 3's vocabulary: larger ids are corrupt
EXPECTED = "a Llama 3 tokenizer.model"
REFETCH = "The file is damaged or another model's: fetch it again"

# How text is split before byte pairs are merged. The model was trained with this pattern.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

N_SPECIAL = 256
LONGEST_TOKEN_BYTES = 1024  # Llama 3's longest has 128; the time to check merges grows with the square
MOST_SPECIAL = 1 << 16  # with unused ids; each takes kilobytes; fine-tunes add or pad some hundred
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
# Llama 3.0 has these ids as reserved special tokens.
RESERVED_ONCE = ("<|eom_id|>", "<|python_tag|>", "<|finetune_right_pad_id|>")

ADDED_TOKENS = "added_tokens.json"
ADDED_TOKENS_FORM = 'an object like {"special": {"<|name|>": id, …}, "ordinary": {"text": id, …}}'


@dataclass(frozen=True)
class Vocabulary:
    """All tokens and their ids.

    ranks: the byte-pair tokens. Their ids are also the order of merging: 0 to n - 1, or with one
    gap of 256 ids for the special tokens if byte pairs were added later. special: text that becomes
    a token only on request. added: ordinary text that always becomes one token, matched leftmost
    and longest. Its bytes may also be a byte-pair token, with the same id or another.
    """

    ranks: dict[bytes, int]
    special: dict[str, int]
    added: dict[str, int] = field(default_factory=dict)

    @property
    def n_words(self) -> int:
        """The number of ids: one more than the highest."""
        return 1 + max(max(ids.values(), default=-1) for ids in (self.ranks, self.special, self.added))

    def special_id(self, text: str) -> int:
        """Id of one of Llama 3's special tokens: by text or, if renamed, by its usual position."""
        return self.special.get(text, self._special_start + SPECIAL_TOKENS.index(text))

    def special_text(self, text: str) -> str:
        """The text of one of Llama 3's special tokens in this vocabulary."""
        token_id = self.special_id(text)
        return next(name for name, i in self.special.items() if i == token_id)

    @cached_property
    def _special_start(self) -> int:
        return self.special.get("<|begin_of_text|>", special_start(self.ranks))

    def beyond(self, n_words: int) -> dict[str, int]:
        """Special tokens added after Llama 3's own whose ids a model of `n_words` cannot generate.

        Some fine-tunes add such a padding token, which the model never sees.
        """
        first_added = special_start(self.ranks) + N_SPECIAL
        return {text: i for text, i in self.special.items() if i >= max(n_words, first_added)}

    def without_beyond(self, n_words: int) -> "Vocabulary":
        """A copy without the tokens of `beyond`."""
        beyond = self.beyond(n_words)
        return replace(self, special={text: i for text, i in self.special.items() if text not in beyond}) if beyond else self

    def with_unused(self, n_words: int | None = None) -> "Vocabulary":
        """A copy with a special token `<|unused_{id}|>` for each unused id below `n_words`."""
        taken = {*self.ranks.values(), *self.special.values(), *self.added.values()}
        n_words = self.n_words if n_words is None else n_words
        unused = {unused_text(i): i for i in range(n_words) if i not in taken}
        return replace(self, special=_by_id(self.special | unused)) if unused else self


def dropped_tokens(beyond: Mapping[str, int], n_words: int) -> str:
    """The warning about tokens that are left out because the model has no embedding for them."""
    shown = comma_list([f"{text!r:.40} ({i})" for text, i in beyond.items()], 4)
    return f"special token {shown} is beyond the model's {n_words:,} embeddings, and is left out: the model cannot use it"


def unused_text(token_id: int) -> str:
    """The placeholder for an id that has an embedding row but no token."""
    return f"<|unused_{token_id}|>"


# Native files


def read_tokenizer_model(path: Path) -> Vocabulary:
    """Read tokenizer.model and, if it exists, the added_tokens.json next to it.

    The 256 special tokens follow the ranks or fill their gap. added_tokens.json adds tokens with
    higher ids, or renames some of the 256. Raises CheckpointError if either file is damaged or they
    contradict each other.
    """
    ranks = read_ranks(path)
    start = special_start(ranks)
    special = {text: start + i for i, text in enumerate(SPECIAL_TOKENS)}
    added_path = path.with_name(ADDED_TOKENS)
    if not added_path.exists():
        return Vocabulary(ranks, special)

    new_special, added = _read_added_tokens(added_path)
    renamed = {*new_special.values(), *added.values()}
    kept = {text: i for text, i in special.items() if i not in renamed}
    if text := next((text for text in kept if text in new_special or text in added), None):
        raise CheckpointError(
            f"{added_path} gives {text!r} the id {(new_special | added)[text]}, but it is token {kept[text]} of {path.name}: "
            "each text can have only one id"
        )
    vocabulary = Vocabulary(ranks, _by_id(kept | new_special), _by_id(added))
    check_vocabulary(added_path, vocabulary)
    _check_no_gap(added_path, vocabulary)
    return vocabulary


def write_tokenizer_model(folder: Path, vocabulary: Vocabulary) -> None:
    """Write tokenizer.model and, for added or renamed tokens, added_tokens.json into `folder`.

    Every id below `vocabulary.n_words` must have a token (see Vocabulary.with_unused). Raises
    CheckpointError for a vocabulary that these files cannot represent.
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
    added_path = folder / ADDED_TOKENS
    if any(sections.values()):
        added_path.write_text(json.dumps(sections, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    else:
        added_path.unlink(missing_ok=True)  # a stale one would be read with the new file


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank, from a tiktoken file. Raises CheckpointError with the damaged line."""
    data = read_small(path, MAX_FILE_BYTES, EXPECTED)
    if data.startswith(b"\n") and b"\0" in data[:512]:
        raise UnsupportedModel(
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
        if b2a_base64(token, newline=False) != fields[0]:  # a2b_base64 skips invalid characters
            raise _bad_line(path, number, line, "does not begin with valid base64")
        if not fields[1].isdigit() or len(fields[1]) > 9:
            raise _bad_line(path, number, line, "does not end in a rank (a whole number, 0 or more)")
        if token in ranks:
            raise _bad_line(path, number, line, f"repeats the token of rank {ranks[token]}")
        ranks[token] = int(fields[1])

    check_ranks(path, ranks)
    return ranks


def special_start(ranks: Mapping[bytes, int]) -> int:
    """The first id of the 256 special tokens: in the gap of the ranks, or after them."""
    taken = set(ranks.values())
    return next(i for i in range(len(ranks) + 1) if i not in taken)


# Checks


def check_ranks(path: Path, ranks: Mapping[bytes, int]) -> None:
    """Raise CheckpointError unless ranks are 0 to n - 1, or have a gap of 256, and cover all bytes.

    Tokens that are too long are rejected too.
    """
    if (longest := max(map(len, ranks), default=0)) > LONGEST_TOKEN_BYTES:
        raise CheckpointError(f"{path} has a token of {longest:,} bytes, expected at most {LONGEST_TOKEN_BYTES:,}. {REFETCH}")
    in_order = sorted(ranks.values())
    gap_start = next((i for i, rank in enumerate(in_order) if i != rank), len(in_order))
    with_gap = [*range(gap_start), *range(gap_start + N_SPECIAL, len(in_order) + N_SPECIAL)]
    if gap_start < len(in_order) and (gap_start == 0 or in_order != with_gap):
        duplicate = next((a for a, b in pairwise(in_order) if a == b), None)
        fault = f"has no token of rank {gap_start}" if duplicate is None else f"gives rank {duplicate} to more than one token"
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
    """Raise CheckpointError for duplicate ids or texts, and missing special tokens."""
    check_ranks(path, vocabulary.ranks)
    if len(vocabulary.special) > MOST_SPECIAL:
        raise CheckpointError(
            f"{path} has {len(vocabulary.special):,} special tokens, expected at most {MOST_SPECIAL:,}. {REFETCH}"
        )
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

    if missing := _missing(vocabulary):
        raise UnsupportedModel(
            f"{path} has no special token {', '.join(missing)}, which Llama 3's texts and dialogs need: it is not Llama 3's "
            "tokenizer, or these tokens were renamed and moved"
        )
    special_ids = set(vocabulary.special.values())
    if missing := [text for text in RESERVED_ONCE if vocabulary.special_id(text) not in special_ids]:
        raise UnsupportedModel(
            f"{path} has no special token {missing[0]} and no other one with its id "
            f"{vocabulary.special_id(missing[0])}: it is not Llama 3's tokenizer"
        )


def padded(path: Path, vocabulary: Vocabulary, n_words: int) -> Vocabulary:
    """The vocabulary of `path` with a placeholder for each unused id below `n_words`.

    Raises CheckpointError if there are far more of them than padding explains.
    """
    n_tokens = len(vocabulary.ranks) + len(vocabulary.special) + len(vocabulary.added)
    if n_words - n_tokens > MOST_SPECIAL:
        raise CheckpointError(
            f"{path} has {n_tokens:,} tokens, but the model has {n_words:,} rows: the tokenizer belongs to another model, or "
            "the size of the vocabulary is wrong"
        )
    return vocabulary.with_unused(n_words)


def _missing(vocabulary: Vocabulary) -> list[str]:
    """Needed special tokens that are absent.

    A renamed one counts as present if its usual id is a special token and another needed token is
    at its usual id by name, as in distilled models. Other tokenizers have other tokens there.
    """
    special, start = vocabulary.special, special_start(vocabulary.ranks)
    usual = {text: start + SPECIAL_TOKENS.index(text) for text in NEEDED}
    is_llama_3 = any(special.get(text) == i for text, i in usual.items())
    ids = set(special.values()) if is_llama_3 else set()
    return [text for text in NEEDED if text not in special and usual[text] not in ids]


def _check_no_gap(path: Path, vocabulary: Vocabulary) -> None:
    taken = {*vocabulary.ranks.values(), *vocabulary.special.values(), *vocabulary.added.values()}
    if len(taken) != vocabulary.n_words:
        absent = next(i for i in range(vocabulary.n_words) if i not in taken)
        raise CheckpointError(
            f"{path} has no token of id {absent}, though others go up to {vocabulary.n_words - 1}: a native tokenizer "
            f"names each one, including unused ones (such as {unused_text(absent)!r})"
        )


def _text_fault(text: str) -> str | None:
    if not text:
        return "an empty text would match everywhere"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "a lone surrogate is not text"
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
            f"{path}, next to a tokenizer.model, is not {ADDED_TOKENS_FORM}. If it was made by Hugging Face's "
            "library, use its tokenizer.json, which has all tokens, and remove this file"
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
