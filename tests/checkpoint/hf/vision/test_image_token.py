"""The image token is one of the special tokens in Meta's tokenizer, the last in Hugging Face's."""

from dataclasses import replace

import pytest

from llama_ref.checkpoint.hf.tokenizer import read_tokenizer_json, write_tokenizer_json
from llama_ref.checkpoint.hf.vision.image_token import IMAGE, PLACE, with_image_in_place, with_image_last
from llama_ref.vocabulary import (
    SPECIAL_TOKENS,
    Vocabulary,
    read_tokenizer_model,
    special_start,
    unused_text,
    write_tokenizer_model,
)
from vocabularies import VOCABULARIES


def test_the_real_vocabulary_has_the_published_names(tokenizer):
    special = with_image_last(tokenizer.vocabulary).special
    published = {
        "<|begin_of_text|>": 128000,
        "<|python_tag|>": 128010,
        "<|reserved_special_token_2|>": 128011,
        "<|reserved_special_token_3|>": 128012,
        "<|reserved_special_token_246|>": 128255,
        "<|image|>": 128256,
    }
    assert {text: special[text] for text in published} == published
    assert len(special) == 257 == len(set(special.values()))


def renamed() -> Vocabulary:
    """Llama 3's vocabulary with a renamed token after the image's, so that names cannot move."""
    vocabulary = VOCABULARIES["bytes alone"]
    special = {"<|mine|>" if i == 256 + 20 else text: i for text, i in vocabulary.special.items()}
    return Vocabulary(vocabulary.ranks, special, vocabulary.added)


@pytest.mark.parametrize("name", [*VOCABULARIES, "renamed"])
def test_any_vocabulary_comes_back_from_hugging_faces_file(tmp_path, name):
    vocabulary = renamed() if name == "renamed" else VOCABULARIES[name]
    last = with_image_last(vocabulary)
    assert last.special[IMAGE] == vocabulary.n_words and last.n_words == vocabulary.n_words + 1
    write_tokenizer_json(tmp_path / "tokenizer.json", last)
    back = read_tokenizer_json(tmp_path / "tokenizer.json")
    special, start = vocabulary.special, special_start(vocabulary.ranks)
    if not all(special.get(text) == start + i for i, text in enumerate(SPECIAL_TOKENS) if i >= PLACE):
        # The others keep their names, and the image's id in Meta's tokenizer is unused.
        special = {unused_text(i) if text == IMAGE else text: i for text, i in special.items()}
    n_words = vocabulary.n_words
    assert back.with_unused(n_words) == replace(vocabulary, special=special).with_unused(n_words)


def test_a_text_models_vocabulary_is_left_alone():
    vocabulary = VOCABULARIES["everything"]
    assert with_image_in_place(vocabulary) is vocabulary


def test_the_native_tokenizer_is_metas(tmp_path, tokenizer, meta_tokenizer_path):
    write_tokenizer_json(tmp_path / "tokenizer.json", with_image_last(tokenizer.vocabulary))
    write_tokenizer_model(tmp_path, read_tokenizer_json(tmp_path / "tokenizer.json"))
    assert (tmp_path / "tokenizer.model").read_bytes() == meta_tokenizer_path.read_bytes()
    assert not (tmp_path / "added_tokens.json").exists()
    assert read_tokenizer_model(tmp_path / "tokenizer.model") == tokenizer.vocabulary
