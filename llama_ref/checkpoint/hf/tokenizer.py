"""Read and write Hugging Face's `tokenizer.json` of a Llama 3 vocabulary."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from llama_ref.checkpoint.hf.vision.image_token import with_image_in_place
from llama_ref.errors import CheckpointError, UnsupportedModel
from llama_ref.files import read_json
from llama_ref.formatting import short
from llama_ref.vocabulary import SPLIT_PATTERN, Vocabulary, check_ranks, check_vocabulary, unused_text

MAX_FILE_BYTES = 64 << 20  # Llama 3's file is 9 or 17 MB; as Python objects it takes up to 25 times as much
EXPECTED = "Llama 3's tokenizer.json"


def _byte_alphabet() -> list[str]:
    """The character of each byte: itself if printable in Latin-1, else the next from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


CHARACTER_OF = _byte_alphabet()
OUTSIDE = "\uffff"  # of the alphabet, and of Latin-1
TO_LATIN_1 = dict.fromkeys(range(256), OUTSIDE) | {ord(character): chr(byte) for byte, character in enumerate(CHARACTER_OF)}

SPLIT_STEP = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
BYTE_LEVEL_STEP = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}

Merge = tuple[bytes, bytes]


# Reading


def read_tokenizer_json(path: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.json that encodes any text like Llama 3's merging by rank.

    `ignore_merges` is assumed to be true: older files without it mean the same vocabulary, and
    Meta's tokenizer always encodes a word that is a token as that token. A vision model's special
    tokens get the ids that they have in Meta's file (vision/image_token.py). Raises CheckpointError, with
    the reason, for any other tokenizer.
    """
    document = read_json(path, MAX_FILE_BYTES, EXPECTED)
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, dict):
        raise _refused(path, 'has no section "model"')
    _check_pipeline(path, document, model)
    vocab = _vocab(path, model)
    spelled = {text: _to_bytes(text) for text in vocab}
    merges = _merges(path, model, vocab, spelled)
    added_tokens = _added_tokens(path, document.get("added_tokens", []), vocab)

    both = added_tokens.keys() & vocab.keys()
    merged = set(merges.values()) if both else set()
    ranks = {}
    for text, token_id in vocab.items():
        token = spelled[text]
        if text in both and (not token or (len(token) > 1 and token not in merged)):
            continue  # an added token that is also in the vocab
        if not token:
            raise _refused(path, f"has the token {text!r}, which is not written in the byte-level alphabet")
        ranks[token] = token_id
    check_ranks(path, ranks)
    _check_merges(path, merges, ranks)

    vocabulary = Vocabulary(
        ranks,
        special={text: token_id for text, (token_id, special) in added_tokens.items() if special},
        added={text: token_id for text, (token_id, special) in added_tokens.items() if not special},
    )
    check_vocabulary(path, vocabulary)
    return with_image_in_place(vocabulary)


def _check_pipeline(path: Path, document: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel unless the pipeline is Llama 3's: its split, then byte-level BPE."""
    if model.get("type", "BPE") != "BPE":
        raise _unsupported(path, f"is a {model['type']!r:.80} model, not byte-pair encoding (BPE)")
    if model.get("byte_fallback"):
        raise _unsupported(path, "is a SentencePiece-style vocabulary (byte_fallback), as Llama 2 and Mistral have")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _unsupported(path, f"has {name} = {model[name]!r:.80}")
    if document.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}):
        raise _unsupported(path, f"changes the text before encoding it (normalizer {_shown(document['normalizer'])})")

    step = document.get("pre_tokenizer")
    steps = step.get("pretokenizers") if isinstance(step, dict) and step.get("type") == "Sequence" else [step]
    if not isinstance(steps, list) or not steps or not isinstance(steps[-1], dict) or steps[-1].get("type") != "ByteLevel":
        raise _unsupported(path, f"has no byte-level pre-tokenizer at its end (pre_tokenizer {_shown(step)})")
    *splits, byte_level = steps
    if splits != [SPLIT_STEP] or byte_level.get("add_prefix_space", True) or byte_level.get("use_regex", True):
        raise _unsupported(path, f"splits text by another pattern (pre_tokenizer {_shown(step)})")


def _vocab(path: Path, model: Mapping[str, Any]) -> dict[str, int]:
    """Token texts in the byte-level alphabet, each with a unique id."""
    vocab = model.get("vocab")
    if not isinstance(vocab, dict):
        raise _refused(path, 'has no "vocab" with ids')
    owner: dict[int, str] = {}
    for text, token_id in vocab.items():
        if type(token_id) is not int:
            raise _refused(path, f"gives {text!r:.80} the id {token_id!r:.80}, which is not a whole number")
        if owner.setdefault(token_id, text) != text:
            raise _refused(path, f"gives id {short(token_id)} to both {owner[token_id]!r:.80} and {text!r:.80}")
    return vocab


def _merges(
    path: Path, model: Mapping[str, Any], vocab: Mapping[str, int], spelled: Mapping[str, bytes | None]
) -> dict[Merge, bytes]:
    """Each merge (a pair or, in older files, two words in one string) with the token that it makes.

    `spelled` gives the bytes of each text in `vocab`.
    """
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise _refused(path, 'has no list "merges"')
    pairs: dict[Merge, bytes] = {}
    last_id = -1
    for number, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or list(map(type, pair)) != [str, str]:
            raise _refused(path, f"has {_shown(merge)} as merge {number}, which is not a pair of tokens")
        first, second = pair
        text = first + second
        left, right, merged = spelled.get(first), spelled.get(second), spelled.get(text)
        if not left or not right or not merged:
            unknown = next((each for each in (first, second, text) if each not in vocab), None)
            fault = "which is not in the byte-level alphabet" if unknown is None else f"but {unknown!r:.80} is not in its vocab"
            raise _refused(path, f"has {_shown(merge)} as merge {number}, {fault}")
        merged_id = vocab[text]
        if merged_id < last_id:
            raise _refused(
                path,
                f"has token {merged_id} as merge {number}, after token {last_id}: its ids are not in merge order",
            )
        last_id = merged_id
        pairs[left, right] = merged
    return pairs


def _added_tokens(path: Path, entries: object, vocab: Mapping[str, int]) -> dict[str, tuple[int, bool]]:
    """Text -> (id, special) of `added_tokens`, sorted by id."""
    if not isinstance(entries, list):
        raise _refused(path, 'has "added_tokens" that are not a list')
    found: dict[str, tuple[int, bool]] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or type(entry.get("id")) is not int:
            raise _refused(path, f"has {_shown(entry)} as an added token, which lacks an id or its content")
        text, token_id = entry["content"], entry["id"]
        if text in found:
            raise _refused(path, f"has the duplicate added token {text!r:.80}")
        if option := next((name for name in ("lstrip", "rstrip", "single_word") if entry.get(name)), None):
            raise _refused(path, f"has the added token {text!r:.80} with {option}, which depends on the surrounding text")
        if vocab.get(text, token_id) != token_id:
            raise _refused(
                path, f"has {text!r:.80} as added token {short(token_id)}, but also as token {short(vocab[text])} of its vocab"
            )
        found[text] = token_id, entry.get("special") is True
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _check_merges(path: Path, merges: Mapping[Merge, bytes], ranks: Mapping[bytes, int]) -> None:
    """Raise CheckpointError if merging by these pairs and by rank encode any text differently.

    Merging by rank joins any two neighbours that together are a token; the file joins only listed
    pairs. Where the two first differ there are neighbours a, b whose join is a token but not a
    listed pair. Nothing was merged across the ends of a + b, so the bytes of a + b alone also end
    up as a, b. It is therefore enough to merge each token's own bytes.
    """
    listed = Counter([merged for (left, right), merged in merges.items() if left in ranks and right in ranks])
    for token in ranks:
        if listed[token] != len(splits(token, ranks)):
            parts = _merge_alone(token, merges, ranks)
            if len(parts) == 2:
                left, right = (_to_text(part) for part in parts)
                raise _refused(
                    path, f"has the token {left + right!r} (id {ranks[token]}) without the merge of {left!r} and {right!r}, "
                    "so its ids cannot come from ranks"
                )  # fmt: skip


def _merge_alone(token: bytes, merges: Mapping[Merge, bytes], ranks: Mapping[bytes, int]) -> list[bytes]:
    """The tokens that a token's own bytes are merged into."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while candidates := [(ranks[merges[pair]], i) for i, pair in enumerate(pairwise(parts)) if pair in merges]:
        _, i = min(candidates)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def splits(token: bytes, ranks: Mapping[bytes, int]) -> list[Merge]:
    """All pairs of tokens that join to this token."""
    return [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]


def _to_bytes(text: str) -> bytes | None:
    """The bytes that `text` spells in the byte-level alphabet; None for any other text."""
    try:
        return text.translate(TO_LATIN_1).encode("latin-1")
    except UnicodeEncodeError:
        return None


def _to_text(token: bytes) -> str:
    return "".join([CHARACTER_OF[byte] for byte in token])


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + "…"


def _refused(path: Path, fault: str, kind: type[CheckpointError] = CheckpointError) -> CheckpointError:
    return kind(f"{path} {fault}, so it is not {EXPECTED}: only Llama 3's byte-level tokenizers are supported")


def _unsupported(path: Path, fault: str) -> CheckpointError:
    """An error for a file that is another kind of tokenizer, and probably intact."""
    return _refused(path, fault, UnsupportedModel)


# Writing


def write_tokenizer_json(path: Path, vocabulary: Vocabulary) -> None:
    """Write a tokenizer.json that encodes any text like `vocabulary`, after begin_of_text.

    Placeholders of unused ids (Vocabulary.with_unused) are left out. Raises CheckpointError for an
    added token whose text is another token's spelling in the byte-level alphabet, because Hugging
    Face's library cannot distinguish them.
    """
    check_vocabulary(path, vocabulary)
    ranks = dict(sorted(vocabulary.ranks.items(), key=lambda item: item[1]))
    vocab = {_to_text(token): rank for token, rank in ranks.items()}
    special = {text: i for text, i in vocabulary.special.items() if text != unused_text(i)}
    added = sorted((special | vocabulary.added).items(), key=lambda item: item[1])
    rank_ids = set(ranks.values())
    for text, i in added:
        if vocab.get(text) != (i if i in rank_ids else None):
            raise CheckpointError(
                f"{path}: the added token {text!r} cannot have the id {i}: in this format's byte-level "
                f"alphabet, the same spelling is token {vocab.get(text, 'without an id')}; rename it, or keep the native format"
            )
    # The library ignores the entry's id: it looks in the vocab, else counts up from its size.
    if [i for _, i in added if i not in rank_ids] != list(range(len(ranks), len(ranks) + len(added))):
        vocab |= dict(added)

    bos = vocabulary.special_text("<|begin_of_text|>")
    bos_step, first, second = {"SpecialToken": {"id": bos, "type_id": 0}}, _sequence("A", 0), _sequence("B", 1)
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(text, i, text in special) for text, i in added],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT_STEP, BYTE_LEVEL_STEP]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos_step, first],
            "pair": [bos_step, first, {"SpecialToken": {"id": bos, "type_id": 1}}, second],
            "special_tokens": {bos: {"id": bos, "ids": [vocabulary.special[bos]], "tokens": [bos]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": [" ".join(map(_to_text, pair)) for pair in _all_merges(ranks)],
        },
    }
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def _all_merges(ranks: Mapping[bytes, int]) -> Iterator[Merge]:
    """All splits of all tokens in rank order, so that merging by pairs equals merging by rank."""
    for token in ranks:
        yield from sorted(splits(token, ranks), key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _added_token(text: str, token_id: int, special: bool) -> dict[str, Any]:
    surroundings = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"id": token_id, "content": text, **surroundings, "normalized": not special, "special": special}


def _sequence(name: str, type_id: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": type_id}}
