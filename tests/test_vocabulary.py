"""Native tokenizer files hold any Llama 3 vocabulary; contradictory files are rejected."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folders import byte_tokenizer
from llama_ref.errors import CheckpointError
from llama_ref.tokenizer import TextFinder, Tokenizer
from llama_ref.vocabulary import SPECIAL_TOKENS, Vocabulary, read_ranks, read_tokenizer_model, write_tokenizer_model
from vocabularies import FIRST_NAMES, KOREAN, VOCABULARIES, vocabulary

# Round trips


@pytest.mark.parametrize("name", VOCABULARIES)
def test_every_vocabulary_comes_back_from_native_files(tmp_path, name):
    write_tokenizer_model(tmp_path, VOCABULARIES[name])
    back = read_tokenizer_model(tmp_path / "tokenizer.model")
    assert back == VOCABULARIES[name]
    assert read_ranks(tmp_path / "tokenizer.model") == back.ranks
    assert list(back.special.values()) == sorted(back.special.values())
    plain = ("bytes alone", "byte pairs", "byte pairs after the special tokens")
    assert (tmp_path / "added_tokens.json").exists() == (name not in plain)


def test_the_real_file_is_written_as_it_is(tmp_path, tokenizer, meta_tokenizer_path):
    write_tokenizer_model(tmp_path, tokenizer.vocabulary)
    assert (tmp_path / "tokenizer.model").read_bytes() == meta_tokenizer_path.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


def test_added_tokens_of_another_vocabulary_do_not_stay_behind(tmp_path):
    write_tokenizer_model(tmp_path, VOCABULARIES["everything"])
    write_tokenizer_model(tmp_path, VOCABULARIES["byte pairs"])
    assert read_tokenizer_model(tmp_path / "tokenizer.model") == VOCABULARIES["byte pairs"]


# Encoding


def opened(tmp_path, vocabulary) -> Tokenizer:
    write_tokenizer_model(tmp_path, vocabulary)
    return Tokenizer(tmp_path / "tokenizer.model")


def test_special_tokens_keep_their_ids_whatever_their_names(tmp_path):
    attributes = ("bos_id", "eos_id", "eot_id", "eom_id", "pad_id", "python_tag_id", "stop_tokens", "n_words")
    plain, old = (opened(tmp_path, vocabulary(names=names)) for names in ({}, FIRST_NAMES))
    assert [getattr(plain, name) for name in attributes] == [getattr(old, name) for name in attributes]
    assert old.decode([old.eom_id]) == "<|reserved_special_token_4|>"


def test_byte_pairs_after_the_special_tokens_are_merged_after_all_others(tmp_path):
    tokenizer = opened(tmp_path, VOCABULARIES["byte pairs after the special tokens"])
    ranks = tokenizer.vocabulary.ranks
    assert tokenizer.encode("나나", bos=False, eos=False) == [ranks["나".encode()]] * 2
    assert tokenizer.encode("가나", bos=False, eos=False) == [ranks["가나".encode()]]
    assert (tokenizer.bos_id, tokenizer.n_words) == (268, 268 + 256 + 6)


def test_added_words_are_one_token_everywhere(tmp_path):
    tokenizer = opened(tmp_path, VOCABULARIES["everything"])
    added, ranks = tokenizer.vocabulary.added, tokenizer.vocabulary.ranks
    assert tokenizer.encode("x말씀하늘y", bos=False, eos=False) == [
        ranks[b"x"],
        added["말씀하"],
        added["늘"],
        ranks[b"y"],
    ]
    assert tokenizer.encode("가나다", bos=True, eos=False) == [
        tokenizer.bos_id,
        added["가나"],
        *(ranks[bytes([byte])] for byte in "다".encode()),
    ]
    assert tokenizer.decode(tokenizer.encode("".join(KOREAN), bos=False, eos=False)) == "".join(KOREAN)
    assert [tokenizer.token_bytes(i).decode() for i in added.values()] == list(added)


def test_allowed_special_tokens_win_over_added_words(tmp_path):
    special = vocabulary(names={2: "<말씀>"}, added=["말씀", "씀><"])
    tokenizer = opened(tmp_path, special)
    word, start = special.added["말씀"], special.special["<말씀>"]
    less, greater = special.ranks[b"<"], special.ranks[b">"]
    assert tokenizer.encode("<말씀>", bos=False, eos=False) == [less, word, greater]
    assert tokenizer.encode("<말씀><", bos=False, eos=False, allowed_special={"<말씀>"}) == [start, less]
    assert tokenizer.encode("말씀<말씀>", bos=False, eos=False, allowed_special="all") == [word, start]


def test_a_word_across_the_split_of_a_long_run_is_found(tmp_path):
    tokenizer = opened(tmp_path, VOCABULARIES["Korean words"])
    ids = tokenizer.encode("x" * 24_999 + "말씀하" + "x" * 10, bos=False, eos=False)
    assert ids[24_999] == tokenizer.vocabulary.added["말씀하"] and len(ids) == 25_010


TEXTS = st.text("ab가]^-\\", max_size=12)


@given(texts=st.sets(TEXTS.filter(bool), max_size=8), text=TEXTS.map(lambda text: text * 2))
def test_texts_are_found_leftmost_and_longest(texts, text):
    in_order = sorted(texts, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, in_order)) or r"(?!)")
    found = list(TextFinder({text: i for i, text in enumerate(in_order)}).split(text))
    assert [in_order[i] for _, i in found[:-1]] == pattern.findall(text)
    assert [before for before, _ in found] == pattern.split(text)
    assert found[-1][1] is None


# Rejected files


ORDINARY, SPECIAL = {"ordinary": {"말": 512}}, {"special": {"<|new|>": 512}}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "an empty file"),
        (b"<html>", "an HTML page"),
        (b"\xff\xfe", "is not valid JSON"),
        (b'{"special": ', "is not valid JSON"),
        (b"[" * 100_000, "nested far deeper"),
        (b'{"ordinary": {"a": ' + b"9" * 5000 + b"}}", "is not valid JSON"),
        (b'{"ordinary": {"bc": 512, "bc": 513}}', 'duplicate key "bc" with different values 512 and 513'),
        ([], "is not an object like"),
        ({"<|new|>": 512}, "is not an object like.* made by Hugging Face's library, use its tokenizer.json"),
        ({"special": ["<|new|>"]}, "is not an object like"),
        (ORDINARY | {"others": {}}, "is not an object like"),
        ({"ordinary": {"말": "512"}}, "'말' the id '512', but an id is a whole number"),
        ({"ordinary": {"말": 512.0}}, "the id 512.0, but"),
        ({"ordinary": {"말": True}}, "the id True, but"),
        ({"ordinary": {"말": -1}}, "the id -1, but"),
        ({"ordinary": {"말": 10**12}}, "the id 1000000000000, but"),
        ({"ordinary": {"": 512}}, "an empty text would match everywhere"),
        ({"ordinary": {"\ud83d": 512}}, "a lone surrogate is not text"),
        ({"ordinary": {"말": 512, "씀": 512}}, "gives id 512 to both '말' and '씀'"),
        (ORDINARY | SPECIAL, "gives id 512 to both '<|new|>' and '말'"),
        ({"ordinary": {"말": 512}, "special": {"말": 513}}, "'말' both as a special and as an ordinary token"),
        ({"ordinary": {"말": 97}}, "'말' the id 97, which is a byte-pair token's"),
        ({"special": {"<|new|>": 97}}, "'<|new|>' the id 97, which is a byte-pair token's"),
        ({"ordinary": {"말": 513}}, "no token of id 512, though others go up to 513"),
        ({"special": {"<|eot_id|>": 512}}, "'<|eot_id|>' the id 512, but it is token 265 of tokenizer.model"),
        ({"ordinary": {"<|my_turn|>": 265}}, "no special token <|eot_id|>, which Llama 3's texts"),
        ({"ordinary": {"말": 264}}, "no special token <|eom_id|> and no other one with its id 264"),
    ],
    ids=str,
)
def test_added_tokens_that_do_not_fit_are_refused(tmp_path, content, message):
    path = byte_tokenizer(tmp_path / "tokenizer.model")
    beside = tmp_path / "added_tokens.json"
    beside.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(CheckpointError, match=re.sub(r"([|<>\[\]])", r"\\\1", message)) as error:
        Tokenizer(path)
    assert str(beside) in str(error.value)


@pytest.mark.parametrize("gap", [1, 255, 257, 512])
def test_ranks_leave_room_for_256_special_tokens_or_none(tmp_path, gap):
    damaged = vocabulary(later=[])
    damaged = replace(damaged, ranks=damaged.ranks | {b"xyz": len(damaged.ranks) + gap})
    with pytest.raises(CheckpointError, match=r"no token of rank 268; .* or leave out exactly 256"):
        write_tokenizer_model(tmp_path, damaged)


@pytest.mark.parametrize(
    "unfit, message",
    [
        (Vocabulary(vocabulary().ranks, dict(zip(SPECIAL_TOKENS[:20], range(268, 288), strict=True))), "ends at 288"),
        (replace(vocabulary(), added={"말": 1000}), "no token of id 524"),
        (replace(vocabulary(), special={}), "no special token <|begin_of_text|>, <|end_of_text|>, <|start_header_id|>"),
        (replace(vocabulary(), ranks={b"a": 0}), "no token for 255 of the 256 single bytes"),
        (vocabulary(pairs=[b"a" * 20_000]), "a token of 20,000 bytes, expected at most 1,024"),
    ],
    ids=["20 special tokens", "holes", "no special tokens", "one byte", "an endless token"],
)
def test_what_native_files_cannot_hold_is_not_written(tmp_path, unfit, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        write_tokenizer_model(tmp_path, unfit)
    assert not list(tmp_path.iterdir())
