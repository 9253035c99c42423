"""Ids equal Meta's on any text, damaged files are rejected, streams show complete characters."""

import copy
import os
import pickle
import re
from base64 import b64encode

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

from corpus import CORPUS, SHORT, WHOLE
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer, split_long, split_runs

ANY_TEXT = st.text(st.characters(exclude_categories=()))  # surrogates too
FRAGMENTS = [*SHORT.values(), *SPECIAL_TOKENS[:12], "<|", "|>", " ", "\n", "\r\n", "'s", "’", "\u3000", "\ud83d", "\ude00"]
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | ANY_TEXT, max_size=8).map("".join)
ORDINARY = [(bytes([i]), i) for i in range(256)]  # the smallest valid file


@pytest.fixture(scope="session")
def meta(meta_tokenizer_path) -> MetaTokenizer:
    return MetaTokenizer(meta_tokenizer_path)


def write(tmp_path, content) -> Tokenizer:
    """Open a tokenizer.model with this content: bytes, or (token, rank) pairs."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content if isinstance(content, bytes) else lines(content))
    return Tokenizer(path)


def lines(pairs, end: bytes = b"\n") -> bytes:
    return b"".join(b"%b %d%b" % (b64encode(token), rank, end) for token, rank in pairs)


# Equal to Meta's


def test_attributes_are_metas(tokenizer, meta):
    names = ["special_tokens", "n_words", "bos_id", "eos_id", "eot_id", "eom_id", "pad_id", "python_tag_id", "stop_tokens"]
    assert {name: getattr(tokenizer, name) for name in names} == {name: getattr(meta, name) for name in names}
    assert list(tokenizer.special_tokens) == list(meta.special_tokens)
    assert (tokenizer.n_words, tokenizer.bos_id) == (128_256, 128_000)


@pytest.mark.parametrize("name", CORPUS)
def test_corpus_has_metas_ids_and_round_trips(tokenizer, meta, name):
    text = CORPUS[name]
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert ids == meta.encode(text, bos=True, eos=True)
    assert tokenizer.decode(ids) == meta.decode(ids)
    whole = "".join(piece.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for piece in split_long(text))
    assert tokenizer.decode(ids[1:-1]) == whole


@given(
    text=TEXTS,
    bos=st.booleans(),
    eos=st.booleans(),
    allowed=st.none() | st.just("all") | st.sets(st.sampled_from([*SPECIAL_TOKENS[:12], "<|", "no such token"])),
    disallowed=st.just("all") | st.sets(st.sampled_from([*SPECIAL_TOKENS[:12], "<|", "no such token"])),
)
def test_any_text_and_any_special_tokens_have_metas_ids(tokenizer, meta, text, bos, eos, allowed, disallowed):
    options = {"bos": bos, "eos": eos, "allowed_special": allowed, "disallowed_special": disallowed}
    try:
        expected = meta.encode(text, **options)
    except ValueError:
        with pytest.raises(RequestError, match="disallowed_special rejects"):
            tokenizer.encode(text, **options)
    else:
        assert tokenizer.encode(text, **options) == expected


@given(TEXTS)
def test_text_never_becomes_a_special_token_by_default(tokenizer, text):
    assert all(i < tokenizer.bos_id for i in tokenizer.encode(text, bos=False, eos=False))


@given(text=st.text("ab \n\u3000", max_size=60), limit=st.integers(1, 9))
@example(text="", limit=3)
def test_runs_are_split_where_meta_splits_them(text, limit):
    assert list(split_runs(text, limit)) == list(MetaTokenizer._split_whitespaces_or_nonwhitespaces(text, limit))


@given(text=st.text("ab \n", max_size=60), max_piece=st.integers(1, 20), max_run=st.integers(1, 9))
def test_pieces_are_bounded_and_join_to_the_text(text, max_piece, max_run):
    cut = list(split_long(text, max_piece, max_run))
    assert "".join(cut) == text
    assert all(0 < len(piece) <= max_piece for piece in cut)
    assert not any(len(run) > max_run for piece in cut for run in re.findall(r"\s+|\S+", piece))


def test_whitespace_of_the_scan_is_whitespace_of_str():
    characters = [chr(i) for i in range(0x110000)]
    assert [c for c in characters if re.match(r"\s", c)] == [c for c in characters if c.isspace()]


# Decoding


def test_special_tokens_decode_to_their_text(tokenizer):
    ids = list(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == "".join(tokenizer.special_tokens)
    assert tokenizer.encode("".join(SPECIAL_TOKENS), bos=False, eos=False, allowed_special="all") == ids


def test_token_bytes_are_the_bytes_of_the_file(tokenizer, meta):
    assert [tokenizer.token_bytes(i) for i in range(tokenizer.n_words)] == meta.model.decode_tokens_bytes(range(meta.n_words))


@pytest.mark.parametrize("token_id", [-1, 128_256, 2**70, 1.0, None, "1"])
def test_unknown_id_is_refused_with_the_vocabulary_size(tokenizer, token_id):
    for call in (lambda: tokenizer.decode([1, token_id]), lambda: tokenizer.token_bytes(token_id)):
        with pytest.raises(
            RequestError, match=re.escape(repr(token_id)) + r" is not a token id.* 128,256 tokens, ids 0 to 128255"
        ):
            call()


@pytest.mark.parametrize("text", [None, b"bytes", ["a", "list"], 5])
def test_only_a_str_is_encoded(tokenizer, text):
    with pytest.raises(RequestError, match=f"got {type(text).__name__}"):
        tokenizer.encode(text, bos=False, eos=False)


@pytest.mark.parametrize("argument", ["allowed_special", "disallowed_special"])
def test_a_bare_string_is_not_taken_for_a_set_of_characters(tokenizer, argument):
    with pytest.raises(RequestError, match=argument):
        tokenizer.encode("x", bos=False, eos=False, **{argument: "<|eot_id|>"})


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["copy", "pickle"])
def test_survives_copying(tmp_path, clone):
    twin = clone(write(tmp_path, ORDINARY))
    assert twin.decode(twin.encode("한글", bos=True, eos=False)) == "<|begin_of_text|>한글"


# Streaming


def stream(tokenizer, ids) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*map(decoder.feed, ids), decoder.flush()]


@given(st.lists(st.integers(0, 255) | st.integers(0, 128_255), max_size=60))  # the first 256 are single bytes
def test_stream_of_any_ids_joins_to_their_text(tokenizer, ids):
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", WHOLE.values(), ids=WHOLE)
def test_stream_never_shows_half_a_character(tokenizer, text):
    single_bytes = [i for byte in text.encode() for i in range(256) if tokenizer.token_bytes(i) == bytes([byte])]
    for ids in (tokenizer.encode(text, bos=False, eos=False), single_bytes):
        shown = stream(tokenizer, ids)
        assert "".join(shown) == text
        assert shown[-1] == ""


def test_flush_ends_the_text_and_the_decoder_can_be_reused(tokenizer):
    decoder = StreamDecoder(tokenizer)
    first_byte = next(i for i in range(256) if tokenizer.token_bytes(i) == "가".encode()[:1])
    assert (decoder.feed(first_byte), decoder.flush(), decoder.flush()) == ("", "\ufffd", "")
    assert decoder.feed(tokenizer.encode("a", bos=False, eos=False)[0]) == "a"


# The file


@pytest.mark.parametrize(
    "content",
    [
        lines(ORDINARY),
        lines(ORDINARY, end=b"\r\n"),
        lines(ORDINARY).rstrip(b"\n"),
        lines(ORDINARY).replace(b"\n", b"\n\n"),
        lines(ORDINARY[::-1]),
        lines((token, 255 - rank) for token, rank in ORDINARY),
    ],
    ids=["as written", "CRLF", "no last newline", "blank lines", "last line first", "other ranks"],
)
def test_equivalent_files_are_read_alike(tmp_path, content):
    tokenizer = write(tmp_path, content)
    ids = tokenizer.encode("hé", bos=True, eos=True)
    assert (ids[0], ids[-1]) == (256, 257)
    assert tokenizer.decode(ids[1:-1]) == "hé"
    assert tokenizer.n_words == 512


SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\x0c\n\x03<s>\x15\0\0\0\0\x18\x03\n\r\n\x04</s>\x15\0\0\0\0\x18\x03"


@pytest.mark.parametrize(
    "content, message",
    [
        (SENTENCEPIECE, "SentencePiece model, as Llama 2"),
        (b"<!DOCTYPE html><title>Sign in</title>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2183982\n", "Git LFS pointer"),
        (b"", "an empty file"),
        (b'{"version": "1.0", "model": {}}', "line 1, is not `base64-token rank`"),
        (lines(ORDINARY) + b"YWI=\n", "line 257, is not `base64-token rank`: 'YWI='"),
        (lines(ORDINARY) + b"YWI= 256 1\n", "line 257, is not `base64-token rank`"),
        (lines(ORDINARY) + b"\n\nYWI 256\n", "line 259, does not begin with valid base64"),
        (lines(ORDINARY) + b"Y*WI= 256\n", "line 257, does not begin with valid base64"),
        (lines(ORDINARY) + "가나 256\n".encode(), "line 257, does not begin with valid base64"),
        (lines([*ORDINARY, (b"ab", -1)]), "line 257, does not end in a rank"),
        (lines(ORDINARY) + b"YWI= 2_56\n", "line 257, does not end in a rank"),
        (lines(ORDINARY) + b"YWI= " + b"9" * 5000, "line 257, does not end in a rank"),
        (lines([*ORDINARY, (b"a", 256)]), "line 257, repeats the token of rank 97"),
        (lines([*ORDINARY, (b"ab", 255)]), "gives rank 255 to more than one token"),
        (lines([*ORDINARY, (b"ab", 257)]), "has no token of rank 256"),
        (lines((token, i + 1) for token, i in ORDINARY), "has no token of rank 0"),
        (lines([*ORDINARY[:255], (b"ab", 255)]), "no token for 1 of the 256 single bytes .*0xff"),
        (b"\n\n", "no token for 256 of the 256 single bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_a_file_that_is_not_a_whole_vocabulary_is_refused(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message) as error:
        write(tmp_path, content)
    assert str(tmp_path / "tokenizer.model") in str(error.value)


def test_a_file_far_too_large_is_not_read_whole(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(lines(ORDINARY))
    os.truncate(path, 1 << 30)  # sparse
    with pytest.raises(CheckpointError, match="larger than 67,108,864 bytes"):
        Tokenizer(path)


def test_a_file_truncated_within_a_line_is_refused(tmp_path, meta_tokenizer_path):
    data = meta_tokenizer_path.read_bytes()
    middle_of_base64 = data.index(b"\n", len(data) // 2) + 3
    with pytest.raises(CheckpointError, match="is not `base64-token rank`"):
        write(tmp_path, data[:middle_of_base64])


@pytest.mark.parametrize("name, message", [("absent.model", "No such file"), (".", "not a plain file")])
def test_a_path_without_a_file_is_refused(tmp_path, name, message):
    with pytest.raises(CheckpointError, match=message):
        Tokenizer(str(tmp_path / name))
