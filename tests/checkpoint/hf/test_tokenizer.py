"""Every Llama 3 vocabulary survives tokenizer.json; files that give other ids are rejected."""

import copy
import json
import re
from dataclasses import replace

import pytest

from llama_ref.chat import ChatFormat
from llama_ref.checkpoint.hf.tokenizer import read_tokenizer_json, write_tokenizer_json
from llama_ref.checkpoint.hf.tokenizer_config import tokenizer_config
from llama_ref.errors import CheckpointError
from llama_ref.tokenizer import Tokenizer
from llama_ref.vocabulary import NEEDED, SPECIAL_TOKENS, write_tokenizer_model
from vocabularies import KOREAN, LATER, VOCABULARIES, vocabulary


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict:
    """A tokenizer.json with byte pairs before and after the special tokens, and added words."""
    path = tmp_path_factory.mktemp("written") / "tokenizer.json"
    write_tokenizer_json(path, vocabulary(later=LATER, added=["말씀", "the"]))
    return json.loads(path.read_text())


def save(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


# Round trips


DISTILLED_NAMES = {0: "<｜begin▁of▁sentence｜>", 1: "<｜end▁of▁sentence｜>", 11: "<｜User｜>", 12: "<｜Assistant｜>"}


@pytest.mark.parametrize("later", [[], LATER])
@pytest.mark.parametrize("names", [{}, {9: "<|im_end|>"}, {6: "<a>", 7: "<b>"}], ids=str)
def test_renamed_special_tokens_are_known_by_their_usual_ids(tmp_path, later, names):
    """DeepSeek-R1-Distill-Llama renames them like this."""
    path = tmp_path / "tokenizer.json"
    distilled = vocabulary(later=later, names=DISTILLED_NAMES | names)
    write_tokenizer_json(path, distilled)
    write_tokenizer_model(tmp_path, distilled)
    write_tokenizer_json(tmp_path / "usual.json", vocabulary(later=later))
    usual = Tokenizer(tmp_path / "usual.json")
    ids = ("bos_id", "eos_id", "eot_id", "eom_id", "pad_id", "python_tag_id", "stop_tokens")
    dialog = [{"role": "user", "content": "the things"}, {"role": "assistant", "content": "in"}]
    for opened in (Tokenizer(path), Tokenizer(tmp_path / "tokenizer.model")):
        assert opened.vocabulary == distilled
        assert [getattr(opened, name) for name in ids] == [getattr(usual, name) for name in ids]
        assert ChatFormat(opened).encode_dialog_prompt(dialog) == ChatFormat(usual).encode_dialog_prompt(dialog)
        assert opened.decode([opened.bos_id]) == "<｜begin▁of▁sentence｜>"


def test_special_tokens_beyond_the_embedding_are_left_out(tmp_path, caplog):
    path = tmp_path / "tokenizer.json"
    usual = VOCABULARIES["byte pairs"]
    n_words = usual.n_words
    write_tokenizer_json(path, replace(usual, special=usual.special | {"[PAD]": n_words}))
    opened = Tokenizer(path, n_words)
    assert opened.vocabulary == usual
    assert f"special token '[PAD]' ({n_words}) is beyond the model's {n_words} embeddings" in caplog.text
    assert opened.decode(opened.encode("a[PAD]", bos=False, eos=False, allowed_special="all")) == "a[PAD]"
    assert Tokenizer(path, n_words + 1).special_tokens["[PAD]"] == n_words  # an embedding that was enlarged
    write_tokenizer_json(path, replace(usual, added={"말": n_words}))
    with pytest.raises(CheckpointError, match="new tokens for which the model's embedding was not enlarged"):
        Tokenizer(path, n_words)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_every_vocabulary_comes_back(tmp_path, name):
    path = tmp_path / "tokenizer.json"
    write_tokenizer_json(path, VOCABULARIES[name])
    unused = {text for text in VOCABULARIES[name].special if text.startswith("<|unused_")}
    assert not any(text in path.read_text() for text in unused)
    opened = Tokenizer(path, VOCABULARIES[name].n_words)
    assert opened.vocabulary == VOCABULARIES[name]
    assert list(opened.special_tokens.values()) == sorted(opened.special_tokens.values())

    write_tokenizer_model(tmp_path, opened.vocabulary)
    native = Tokenizer(tmp_path / "tokenizer.model")
    text = "the things in 가나 123!!\n\n" + " ".join(KOREAN[::7])
    assert native.encode(text, bos=True, eos=True) == opened.encode(text, bos=True, eos=True)


def test_the_model_may_have_more_rows_than_the_tokenizer_has_tokens(tmp_path):
    path = tmp_path / "tokenizer.json"
    write_tokenizer_json(path, VOCABULARIES["bytes alone"])
    assert Tokenizer(path).n_words == 512
    padded = Tokenizer(path, n_words=576)
    assert (padded.n_words, padded.decode([512, 575])) == (576, "<|unused_512|><|unused_575|>")
    assert padded.encode("<|unused_512|>", bos=False, eos=False) == list(b"<|unused_512|>")
    for n_words in (511, 1 << 40):
        with pytest.raises(CheckpointError, match=rf"has 512 ids .*reserved_special_token_245.* model has {n_words:,} rows"):
            Tokenizer(path, n_words=n_words)


def older_merges(content: dict) -> None:
    content["model"]["merges"] = [pair if i % 2 else pair.split() for i, pair in enumerate(content["model"]["merges"])]


def without_ignore_merges(content: dict) -> None:
    del content["model"]["ignore_merges"]


def unneeded_merge_left_out(content: dict) -> None:
    content["model"]["merges"].remove("Ġt he")  # " the" is made of " th" and "e" before


def added_by_themselves(content: dict) -> None:
    for entry in content["added_tokens"]:
        if entry["content"] != "the":  # also a byte pair
            del content["model"]["vocab"][entry["content"]]


def added_last_first(content: dict) -> None:
    content["added_tokens"].reverse()


def with_settings_of_use(content: dict) -> None:
    content["truncation"] = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
    content["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    content["pre_tokenizer"]["pretokenizers"][1]["trim_offsets"] = False


HARMLESS = [older_merges, without_ignore_merges, added_by_themselves, added_last_first, with_settings_of_use]


@pytest.mark.parametrize("change", [*HARMLESS, unneeded_merge_left_out], ids=lambda change: change.__name__)
def test_equivalent_files_are_read_alike(tmp_path, written, change):
    content = copy.deepcopy(written)
    change(content)
    assert content != written
    assert read_tokenizer_json(save(tmp_path, content)) == vocabulary(later=LATER, added=["말씀", "the"])


# Refused


def put(*keys, value):
    """A function that changes the value at these keys."""

    def change(content: dict) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value(content[keys[-1]]) if callable(value) else value

    return change


MODEL = ("model",)
STEPS = ("pre_tokenizer", "pretokenizers")
DIGITS = {"type": "Digits", "individual_digits": True}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
GPT4 = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)


def renamed(old: str, new: str):
    def change(content: dict) -> None:
        for entry in content["added_tokens"]:
            entry["content"] = new if entry["content"] == old else entry["content"]
        content["model"]["vocab"].pop(old, None)

    return change


def of_another_family(content: dict) -> None:
    """Like GPT-4's tokenizer: byte-level, with Llama 3's split, but with other special tokens."""
    for i, name in enumerate(NEEDED):
        renamed(name, f"<|other_{i}|>")(content)


def without_byte(content: dict) -> None:
    content["model"]["vocab"]["ĠĠĠ"] = content["model"]["vocab"].pop("Ċ")
    content["model"]["merges"].remove("Ċ Ċ")


def llama_2(content: dict) -> None:
    content["model"] |= {"byte_fallback": True, "unk_token": "<unk>"}
    content |= {"normalizer": {"type": "Prepend", "prepend": "▁"}, "pre_tokenizer": None}


@pytest.mark.parametrize(
    "change, message",
    [
        (llama_2, "SentencePiece-style vocabulary (byte_fallback), as Llama 2"),
        (put(*MODEL, value=None), 'has no section "model"'),
        (put(*MODEL, "type", value="Unigram"), "is a 'Unigram' model, not byte-pair encoding"),
        (put(*MODEL, "type", value=["BPE"]), "not byte-pair encoding"),
        (put(*MODEL, "dropout", value=0.1), "has dropout = 0.1"),
        (put(*MODEL, "end_of_word_suffix", value="</w>"), "has end_of_word_suffix = '</w>'"),
        (put("normalizer", value={"type": "NFC"}), 'changes the text before encoding it (normalizer {"type": "NFC"})'),
        (put("pre_tokenizer", value=None), "has no byte-level pre-tokenizer"),
        (put("pre_tokenizer", value={"type": "Sequence"}), "has no byte-level pre-tokenizer"),
        (put("pre_tokenizer", value={"type": "Metaspace"}), "has no byte-level pre-tokenizer"),
        (put("pre_tokenizer", value=BYTE_LEVEL), "splits text by another pattern"),
        (put(*STEPS, value=[DIGITS, BYTE_LEVEL]), "splits text by another pattern"),
        (put(*STEPS, 0, "pattern", value={"Regex": GPT4}), "splits text by another pattern"),
        (put(*STEPS, 0, "behavior", value="Removed"), "splits text by another pattern"),
        (put(*STEPS, 1, "use_regex", value=True), "splits text by another pattern"),
        (put(*STEPS, 1, "add_prefix_space", value=True), "splits text by another pattern"),
        (put(*MODEL, "vocab", value=[]), 'no "vocab" with ids'),
        (put(*MODEL, "vocab", "xyz", value="529"), "'xyz' the id '529', which is not a whole number"),
        (put(*MODEL, "vocab", "xyz", value=5), "gives id 5 to both 'ą' and 'xyz'"),
        (put(*MODEL, "vocab", "xyz", value=-1), "has no token of rank 0"),
        (put(*MODEL, "vocab", "xyz", value=10**30), "has no token of rank 268"),
        (put(*MODEL, "vocab", "가", value=9999), "'가', which is not written in the byte-level alphabet"),
        (put(*MODEL, "vocab", "", value=9999), "'', which is not written in the byte-level alphabet"),
        (without_byte, "no token for 1 of the 256 single bytes (the first is 0x0a)"),
        (put(*MODEL, "vocab", "a" * 20_000, value=9999), "has a token of 20,000 bytes, expected at most 1,024"),
        (put(*MODEL, "merges", value={}), 'no list "merges"'),
        (put(*MODEL, "merges", 0, value="t h e"), 'has "t h e" as merge 0, which is not a pair'),
        (put(*MODEL, "merges", 0, value=[1, 2]), "has [1, 2] as merge 0, which is not a pair"),
        (put(*MODEL, "merges", 0, value="t q"), "'tq' is not in its vocab"),
        (put(*MODEL, "merges", 0, value=" th"), "merge 0, but '' is not in its vocab"),
        (put(*MODEL, "merges", value=lambda merges: merges[::-1]), "not in merge order"),
        (put(*MODEL, "merges", value=lambda merges: merges[1:]), "token 'th' (id 256) without the merge of 't' and 'h'"),
        (put("added_tokens", value={}), '"added_tokens" that are not a list'),
        (put("added_tokens", 0, value={"content": "x"}), "which lacks an id or its content"),
        (put("added_tokens", value=lambda tokens: tokens * 2), "the duplicate added token 'the'"),
        (put("added_tokens", -1, "lstrip", value=True), "with lstrip, which depends on the surrounding text"),
        (put("added_tokens", -1, "single_word", value=True), "with single_word, which"),
        (put("added_tokens", -1, "id", value=9999), "as added token 9999, but also as token"),
        (of_another_family, "no special token <|begin_of_text|>, <|end_of_text|>, <|start_header_id|>"),
        (put("added_tokens", value=[]), "not written in the byte-level alphabet"),
    ],
    ids=lambda value: re.sub(r"\W+", "_", value) if isinstance(value, str) else "file",
)
def test_a_tokenizer_that_is_not_llama_3s_is_refused(tmp_path, written, change, message):
    content = copy.deepcopy(written)
    change(content)
    path = save(tmp_path, content)
    with pytest.raises(CheckpointError) as error:
        Tokenizer(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 17209920\n", "Git LFS pointer"),
        (b'{"version": "1.0", "model": {"type"', "is not valid JSON"),
        (b"\x80\x02}", "is not valid JSON"),
        (b"[" * 200_000, "nested far deeper"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0, "a": 1}}}', 'duplicate key "a" with different values 0 and 1'),
        (b"[]", 'no section "model"'),
        (b"null", 'no section "model"'),
        (b"{}", 'no section "model"'),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        Tokenizer(save(tmp_path, content))


def test_a_word_that_the_byte_alphabet_writes_too_is_not_written(tmp_path):
    clashing = replace(vocabulary(), added={"é": 524})  # the alphabet's spelling of byte 0xe9
    with pytest.raises(CheckpointError, match=r"the added token 'é' cannot have the id 524.* is token 233"):
        write_tokenizer_json(tmp_path / "tokenizer.json", clashing)
    assert not list(tmp_path.iterdir())


# tokenizer_config.json


def test_a_chat_model_ends_with_its_turn_and_a_base_model_with_the_text():
    chat, base = (tokenizer_config(vocabulary(), 4096, instruct=instruct) for instruct in (True, False))
    assert (chat["eos_token"], base["eos_token"]) == ("<|eot_id|>", "<|end_of_text|>")
    assert "<|start_header_id|>" in chat["chat_template"] and "chat_template" not in base
    assert (chat["bos_token"], chat["model_max_length"]) == (SPECIAL_TOKENS[0], 4096)
    json.dumps(chat)
