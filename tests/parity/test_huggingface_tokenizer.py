"""Hugging Face's libraries agree with our ids, texts and dialogs, on our files and on theirs."""

import itertools
import json
import re
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from corpus import CODE, PROSE, WHOLE
from dialogs import ASSISTANTS, DIALOGS, OTHERS
from llama_ref.chat import ChatFormat
from llama_ref.checkpoint.hf.chat_template import chat_template
from llama_ref.checkpoint.hf.tokenizer import read_tokenizer_json, write_tokenizer_json
from llama_ref.checkpoint.hf.tokenizer_config import tokenizer_config
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.tokenizer import Tokenizer
from llama_ref.vocabulary import SPECIAL_TOKENS, SPLIT_PATTERN
from vocabularies import KOREAN, VOCABULARIES, vocabulary

ORDINARY = [text for text in WHOLE.values() if "<|" not in text]
TEXTS = st.lists(st.sampled_from(ORDINARY) | st.text(), max_size=4).map("".join).filter(lambda text: "<|" not in text)


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory, tokenizer) -> Path:
    """The real vocabulary in Hugging Face's files, as a converted model has them."""
    folder = tmp_path_factory.mktemp("hf")
    write_tokenizer_json(folder / "tokenizer.json", tokenizer.vocabulary)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(tokenizer.vocabulary, 131_072)))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return folder


@pytest.fixture(scope="session")
def hf(hf_folder) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(hf_folder)


@pytest.fixture(scope="session")
def chat(tokenizer) -> ChatFormat:
    return ChatFormat(tokenizer)


# The real vocabulary


def test_the_folder_opens_as_it_is(hf, tokenizer):
    assert len(hf) == tokenizer.n_words
    assert (hf.bos_token_id, hf.eos_token_id, hf.pad_token_id) == (tokenizer.bos_id, tokenizer.eot_id, tokenizer.pad_id)
    assert hf.model_max_length == 131_072
    assert hf.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(tokenizer.special_tokens.values())


@pytest.mark.parametrize("name", [name for name in WHOLE if "special_text" not in name])
def test_corpus_has_our_ids_and_comes_back(hf, tokenizer, name):
    ids = hf(WHOLE[name]).input_ids
    assert ids == tokenizer.encode(WHOLE[name], bos=True, eos=False)
    assert hf.decode(ids) == tokenizer.decode(ids) == "<|begin_of_text|>" + WHOLE[name]


@given(TEXTS)
def test_any_text_has_our_ids_and_comes_back(hf, tokenizer, text):
    ids = hf(text).input_ids
    assert ids == tokenizer.encode(text, bos=True, eos=False)
    assert hf.decode(ids) == tokenizer.decode(ids)


@given(TEXTS, st.sampled_from(SPECIAL_TOKENS), TEXTS)
def test_special_tokens_that_are_allowed_are_where_hugging_face_finds_them(hf, tokenizer, before, special, after):
    ids = tokenizer.encode(before + special + after, bos=True, eos=False, allowed_special="all")
    assert hf(before + special + after).input_ids == ids


def test_the_real_vocabulary_comes_back(hf_folder, tokenizer):
    back = read_tokenizer_json(hf_folder / "tokenizer.json")
    assert back == tokenizer.vocabulary
    assert list(back.special) == list(tokenizer.special_tokens)


# Dialogs


def in_hugging_faces_form(message: dict) -> dict:
    calls = [
        {"type": "function", "function": {"name": call["tool_name"], "arguments": call["arguments"]}}
        for call in message.get("tool_calls") or []
    ]
    return message | {"tool_calls": calls, "content": message["content"] or None} if calls else message


IPYTHON = st.fixed_dictionaries({"role": st.just("ipython"), "content": TEXTS})
DIALOG = st.lists(OTHERS | ASSISTANTS | IPYTHON, min_size=1, max_size=4)


def rendered(hf, dialog: list, add_generation_prompt: bool = True) -> str:
    return hf.apply_chat_template(dialog, tokenize=False, add_generation_prompt=add_generation_prompt)


def agree(hf, chat: ChatFormat, dialog: list) -> None:
    """The template writes our ids' text, with or without an open header, for any form of calls."""
    ids = chat.encode_dialog_prompt(dialog)
    text, header = chat.tokenizer.decode(ids), chat.tokenizer.decode(chat.encode_header("assistant"))
    for form in (dialog, [in_hugging_faces_form(message) for message in dialog]):
        assert rendered(hf, form) == text
        assert rendered(hf, form, add_generation_prompt=False) + header == text


@pytest.mark.parametrize("dialog", DIALOGS.values(), ids=DIALOGS)
def test_dialogs_are_written_as_we_encode_them(hf, chat, dialog):
    agree(hf, chat, dialog)


def test_a_content_of_items_is_their_texts(hf, chat):
    items = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    agree(hf, chat, [{"role": "system", "content": items}, {"role": "user", "content": items[:1]}])


@given(DIALOG)
def test_any_dialog_is_written_as_we_encode_it(hf, chat, dialog):
    agree(hf, chat, dialog)


def is_cut_alike(message: dict) -> bool:
    """Ids may differ where texts meet: a line break joins the header's, a call the text before."""
    texts = [message["content"], *(v for call in message.get("tool_calls") or [] for v in map(str, call["arguments"].values()))]
    return (
        not any("<|" in text or re.match(r"\s*[\r\n]", text) for text in texts)
        and len(message.get("tool_calls") or []) <= 1
        and not (message["content"] and message.get("tool_calls"))
    )


ONE_CALL = ASSISTANTS.map(lambda message: message | {"content": ""} if message.get("tool_calls") else message)


@given(st.lists((OTHERS | ONE_CALL | IPYTHON).filter(is_cut_alike), min_size=1, max_size=3))
def test_any_dialog_has_our_ids(hf, chat, dialog):
    ids = chat.encode_dialog_prompt(dialog)
    assert hf.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False) == ids


def calling(*calls) -> list:
    return [{"role": "assistant", "content": "", "tool_calls": list(calls)}]


USER = {"role": "user", "content": "x"}
MALFORMED = [
    [],
    [{"role": "user"}],
    [{"content": "x"}],
    [{"role": "human", "content": "x"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": []}],
    [{"role": "user", "content": ["x"]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "text", "text": 1}]}],
    [{"role": "user", "content": [{"type": "image", "image": "of a text model"}]}],
    [{**USER, "stop_reason": "stop"}],
    [{**USER, "stop_reason": ""}],
    [{**USER, "tool_calls": [{"tool_name": "f", "arguments": {}}]}],
    calling("f()"),
    calling({"tool_name": "f"}),
    calling({"tool_name": 5, "arguments": {}}),
    calling({"tool_name": "brave_search", "arguments": {"q": "x"}}),
    calling({"tool_name": "code_interpreter", "arguments": "1+1"}),
]


@pytest.mark.parametrize("dialog", MALFORMED, ids=json.dumps)
def test_the_template_refuses_what_we_refuse(hf, chat, dialog):
    with pytest.raises(RequestError):
        chat.encode_dialog_prompt(dialog)
    with pytest.raises(TemplateError):
        hf.apply_chat_template([dialog], tokenize=False)  # in a batch, because the library itself fails on an empty dialog


def test_tools_are_refused_rather_than_left_out(hf):
    tool = {
        "type": "function",
        "function": {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}},
    }
    with pytest.raises(TemplateError, match="describe them in the text of a message"):
        hf.apply_chat_template([USER], tools=[tool], tokenize=False)


# Enlarged vocabularies


def opened_by_hugging_face(path: Path, vocabulary) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path), chat_template=chat_template(vocabulary), clean_up_tokenization_spaces=False
    )


WORDS = st.lists(st.sampled_from([*KOREAN, *ORDINARY, "the things", "나", "하", " "]), max_size=6).map("".join)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_every_vocabulary_has_our_ids(tmp_path, name):
    path = tmp_path / "tokenizer.json"
    write_tokenizer_json(path, VOCABULARIES[name])
    ours = Tokenizer(path, VOCABULARIES[name].n_words)
    hf = opened_by_hugging_face(path, ours.vocabulary)
    agree(hf, ChatFormat(ours), DIALOGS["code"])

    @given(WORDS)
    @settings(max_examples=30)
    def agrees(text):
        ids = hf(text).input_ids
        assert ids == ours.encode(text, bos=True, eos=False)
        assert hf.decode(ids) == ours.decode(ids)

    agrees()
    special = "".join(text for text in ours.special_tokens if "unused" not in text)
    assert hf(special).input_ids == ours.encode(special, bos=True, eos=False, allowed_special="all")


def test_words_that_the_library_added_are_read(tmp_path, hf_folder):
    theirs = tokenizers.Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
    theirs.add_tokens([*KOREAN, "하늘바람", "도레미 솔", "hello"])
    theirs.add_special_tokens(["[PAD]"])
    path = tmp_path / "tokenizer.json"
    theirs.save(str(path))
    ours = Tokenizer(path, n_words=128_512)
    for text in (*ORDINARY, "".join(KOREAN), "하늘바람하늘 도레미 솔파, hellohello Othello", " ".join(KOREAN)):
        ids = theirs.encode(text).ids
        assert ids == ours.encode(text, bos=True, eos=False)
        assert ours.decode(ids[1:]) == text
    assert ours.encode("[PAD]", bos=True, eos=False, allowed_special="all") == theirs.encode("[PAD]").ids


def train(n_words: int) -> dict:
    """A byte-level vocabulary as `tokenizers` trains it."""
    theirs = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated")
    theirs.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    theirs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=n_words, initial_alphabet=alphabet, min_frequency=1, show_progress=False)
    theirs.train_from_iterator([*PROSE.values(), *CODE.values()] * 2, trainer)
    theirs.add_special_tokens(list(SPECIAL_TOKENS))
    return json.loads(theirs.to_str())


def test_a_vocabulary_that_the_library_trained_is_read_and_so_are_merges_put_after_its_special_tokens(tmp_path):
    short, long = train(600), train(900)
    words = [text for text, i in long["model"]["vocab"].items() if i >= 600]
    enlarged = {**short, "model": {**short["model"], "merges": long["model"]["merges"]}}
    ids = {entry["content"]: entry["id"] for entry in short["added_tokens"]}
    enlarged["model"]["vocab"] = short["model"]["vocab"] | ids | {text: 856 + i for i, text in enumerate(words)}
    for content, n_words in ((short, 856), (enlarged, 1156)):
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(content))
        ours, theirs = Tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
        assert ours.n_words == n_words
        for text in ORDINARY:
            assert ours.encode(text, bos=False, eos=False) == theirs.encode(text).ids
        write_tokenizer_json(path, ours.vocabulary)
        again = tokenizers.Tokenizer.from_file(str(path))
        for text in ORDINARY:
            assert again.encode(text, add_special_tokens=False).ids == theirs.encode(text).ids


TOKENS = st.sets(st.text("ab", min_size=2, max_size=4), max_size=8)
ALL_TEXTS = ["".join(letters) + end for n in range(1, 8) for letters in itertools.product("ab", repeat=n) for end in ("", "z")]


@given(tokens=st.permutations(["ab", "ba", "aa", "bb"]), longer=TOKENS, data=st.data())
@settings(max_examples=60)
def test_merging_by_pairs_is_merging_by_rank_unless_the_file_is_refused(tmp_path_factory, tokens, longer, data):
    """Also for pairs that no training would give: accepted files give equal ids, others do not."""
    order = data.draw(st.permutations(list({*tokens, *longer})))
    path = tmp_path_factory.mktemp("pairs") / "tokenizer.json"
    whole = vocabulary(pairs=[text.encode() for text in order])
    write_tokenizer_json(path, whole)
    content = json.loads(path.read_text())
    merges = content["model"]["merges"]
    content["model"]["merges"] = [merge for merge in merges if data.draw(st.integers(0, 4))]
    native = Tokenizer(path)

    def differing() -> list[str]:
        theirs = tokenizers.Tokenizer.from_file(str(path))
        return [
            text
            for text in ALL_TEXTS
            if theirs.encode(text, add_special_tokens=False).ids != native.encode(text, bos=False, eos=False)
        ]

    assert not differing()
    path.write_text(json.dumps(content))
    try:
        assert read_tokenizer_json(path) == whole
    except CheckpointError as error:
        assert "so its ids cannot come from ranks" in str(error)
        assert differing()
    else:
        assert not differing()
