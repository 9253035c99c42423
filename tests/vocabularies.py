"""Small vocabularies of every kind in real files, for tests of readers and writers."""

from itertools import product

from llama_ref.vocabulary import N_SPECIAL, SPECIAL_TOKENS, Vocabulary

BYTES = [bytes([byte]) for byte in range(256)]
PAIRS = [b"th", b"in", b" t", b" th", b" the", b"\xea\xb0", "가".encode(), b"he", b"the", b"\n\n", b"12", b"!!"]
# The last has no split into known tokens.
LATER = ["나".encode()[:2], "나".encode(), "가나".encode(), b"ing", b" this", b"xyz"]
KOREAN = ["".join(word) for n in (1, 2, 3) for word in product("말씀하늘바", repeat=n)] + [
    "가",
    "가나",
    "가나다라",
    "the",
    " 같이",
]

# The names of the same 256 ids in Llama 3.0's files, and in later ones in Hugging Face's format.
FIRST_NAMES = dict(zip((4, 5, 8, 10, 11), (f"<|reserved_special_token_{i}|>" for i in (2, 3, 4, 5, 6)), strict=True))
FIRST_NAMES |= {i: f"<|reserved_special_token_{i - 5}|>" for i in range(12, N_SPECIAL)}
HF_NAMES = {5: "<|reserved_special_token_2|>", 11: "<|reserved_special_token_3|>"}
HF_NAMES |= {i: f"<|reserved_special_token_{i - 8}|>" for i in range(12, N_SPECIAL)}
CHATML_NAMES = {2: "<|im_start|>", 3: "[PAD]", 255: "<think> 'it\"s' \\ 🙂"}


def vocabulary(pairs=PAIRS, later=(), names=None, added=()) -> Vocabulary:
    """256 bytes, `pairs`, special tokens renamed by `names`, `later` byte pairs, `added` words."""
    first = [*BYTES, *pairs]
    ranks = {token: i for i, token in enumerate(first)} | {token: len(first) + N_SPECIAL + i for i, token in enumerate(later)}
    special = {(names or {}).get(i, text): len(first) + i for i, text in enumerate(SPECIAL_TOKENS)}
    # Like Hugging Face's library: a word keeps the id of a byte-pair token with the same spelling,
    # which only ASCII words have.
    new = [text for text in added if not (text.isascii() and text.encode() in ranks)]
    ids = {text: len(ranks) + N_SPECIAL + i for i, text in enumerate(new)}
    return Vocabulary(ranks, special, {text: ids.get(text, ranks.get(text.encode())) for text in added})


VOCABULARIES = {
    "bytes alone": vocabulary(pairs=[]),
    "byte pairs": vocabulary(),
    "byte pairs after the special tokens": vocabulary(later=LATER),
    "names of Llama 3.0": vocabulary(names=FIRST_NAMES),
    "names of Hugging Face's releases": vocabulary(names=HF_NAMES),
    "renamed reserved tokens": vocabulary(names=CHATML_NAMES),
    "Korean words": vocabulary(added=KOREAN),
    "everything": vocabulary(later=LATER, names=HF_NAMES | CHATML_NAMES, added=KOREAN),
    "ids in use here and there": vocabulary(added=KOREAN).with_unused(1000),
}
