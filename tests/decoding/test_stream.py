"""Streamed text: whole characters, stop strings across tokens, and abandoning it at any point."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus import WHOLE
from llama_ref.compiled.caches import new_cache
from llama_ref.decoding.row import Row
from llama_ref.decoding.stream import RowText, Stream
from llama_ref.errors import RequestError
from llama_ref.kv_cache import KVCache
from llama_ref.tokenizer import Tokenizer

CAPITAL = "The capital of France is"  # greedily continued " Paris.\n\nThe capital of France is Paris"
SUM = [{"role": "user", "content": "What is 2+2?"}]  # greedily answered "2 + 2 = 4", end of turn


def stream_of(ids: list[int], tokenizer: Tokenizer, stop: str | list[str] = (), *, max_gen_len: int | None = None) -> Stream:
    """A stream of these ids, without a model."""
    row = Row([1], len(ids) if max_gen_len is None else max_gen_len)

    def steps() -> Iterator[None]:
        for token in ids:
            row.take(token, 0.0, tokenizer.stop_tokens)
            yield
            if row.finish_reason:
                return

    return Stream(RowText(row, tokenizer, stop), steps())


# ---- whole characters


@given(st.data())
def test_pieces_of_any_ids_join_to_the_decoded_whole(tokenizer, data):
    ids = data.draw(st.lists(st.one_of(st.integers(0, 255), st.integers(0, tokenizer.n_words - 1)), min_size=1, max_size=30))
    stream = stream_of(ids, tokenizer)
    pieces = list(stream)
    assert all(pieces)
    assert "".join(pieces) == stream.text == tokenizer.decode(stream.tokens)
    ended = [i for i, token in enumerate(ids) if token in tokenizer.stop_tokens]
    assert stream.tokens == (ids[: ended[0]] if ended else ids)
    assert stream.finish_reason == ("stop" if ended else "length")


@pytest.mark.parametrize("name", WHOLE)
def test_no_piece_holds_half_a_character(tokenizer, name):
    ids = tokenizer.encode(WHOLE[name], bos=False, eos=False)
    pieces = list(stream_of(ids, tokenizer))
    assert "".join(pieces) == WHOLE[name]
    assert sum(piece.count("\ufffd") for piece in pieces) == WHOLE[name].count("\ufffd")


@given(text=st.text(st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), min_size=1, max_size=12))
def test_characters_that_come_byte_by_byte_come_out_whole(tokenizer, text):
    ids = [token for byte in text.encode() for token in tokenizer._encoding._encode_bytes(bytes([byte]))]
    assert len(ids) == len(text.encode())
    assert list(stream_of(ids, tokenizer)) == list(text)


def test_an_unfinished_character_at_the_end_is_shown_as_the_decoder_shows_it(tokenizer):
    ids = tokenizer.encode("뷁", bos=False, eos=False)
    assert len(ids) > 1
    assert list(stream_of(ids[:-1], tokenizer)) == [tokenizer.decode(ids[:-1])]


# ---- stop strings


def cut_at_first_complete(text: str, stop: list[str]) -> str | None:
    """The text before the stop string that is complete first; None if there is none."""
    for end in range(1, len(text) + 1):
        complete = [string for string in stop if text[:end].endswith(string)]
        if complete:
            return text[: end - max(map(len, complete))]
    return None


@given(
    chunks=st.lists(st.text("ab한👍", min_size=1, max_size=4), min_size=1, max_size=8),
    stop=st.lists(st.text("ab한👍", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_end_it_wherever_tokens_cut_them(tokenizer, chunks, stop):
    ids = [token for chunk in chunks for token in tokenizer.encode(chunk, bos=False, eos=False)]
    text = "".join(chunks)
    cut = cut_at_first_complete(text, stop)
    stream = stream_of(ids, tokenizer, stop)
    pieces = list(stream)
    assert all(pieces)
    assert "".join(pieces) == stream.text == (text if cut is None else cut)
    if cut is not None:
        assert stream.finish_reason == "stop"
        assert len(stream.text) < len(tokenizer.decode(stream.tokens)) <= len(text)
    else:
        assert stream.finish_reason == "length"
        assert stream.tokens == ids


@given(
    chunks=st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=8), stop=st.text("ab", min_size=1, max_size=5)
)
def test_no_more_is_held_back_than_may_become_a_stop_string(tokenizer, chunks, stop):
    """Text appears early: a step holds back only the longest suffix that starts a stop string."""
    ids = [token for chunk in chunks for token in tokenizer.encode(chunk, bos=False, eos=False)]
    stream = stream_of(ids, tokenizer, stop, max_gen_len=len(ids) + 1)
    for _ in stream:
        made = tokenizer.decode(stream.tokens)
        if stream.finish_reason is None and len(stream.tokens) < len(ids):
            held = next((n for n in range(min(len(stop) - 1, len(made)), 0, -1) if stop.startswith(made[-n:])), 0)
            assert stream.text == made[: len(made) - held]


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], ["a", 5], [None], 5, None, True])
def test_what_is_no_stop_string_is_refused(llama, stop):
    with pytest.raises(RequestError, match=r"stop is .*expected a non-empty string"):
        llama.stream("Hello", 2, stop=stop)


# ---- with the model


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("Paris", " "),
        (["\n\n"], " Paris."),
        (["London", "aris."], " P"),
        ([".\n\nThe cap", "Paris.\n"], " "),  # the second is complete first
        ((".\n\nThe capital",), " Paris"),
    ],
)
def test_a_stop_string_is_found_and_hidden(llama, stop, text):
    stream = llama.stream(CAPITAL, 12, 0.0, stop=stop)
    assert stream.finish_reason is None
    assert "".join(stream) == stream.text == text
    assert stream.finish_reason == "stop"
    assert len(stream.tokens) < 12, "it went on after the stop string"


def test_the_finish_reason_says_why(llama):
    assert "".join(ended := llama.stream(SUM, 12, 0.0)) == "2 + 2 = 4"
    assert ended.finish_reason == "stop"
    assert "".join(cut := llama.stream(SUM, 3, 0.0)) == "2 + "
    assert cut.finish_reason == "length"
    assert list(none := llama.stream(SUM, 0)) == []
    assert (none.finish_reason, none.text, none.tokens) == ("length", "", [])


def test_texts_ids_and_dialogs_are_all_prompts(shallow):
    ids = shallow.tokenizer.encode(CAPITAL, bos=True, eos=False)
    [expected], _ = shallow.generate([ids], 5, 0.0)
    for prompt in (CAPITAL, ids):
        stream = shallow.stream(prompt, 5, 0.0)
        assert "".join(stream) == shallow.tokenizer.decode(expected)
        assert stream.tokens == expected
    [answer] = shallow.chat_completion([SUM], 0.0, max_gen_len=5)
    assert "".join(shallow.stream(SUM, 5, 0.0)) == answer["generation"]["content"] != ""


@pytest.mark.parametrize(
    ("prompt", "beginning"), [("한국의 수도는", [" ", "어", "려", "면"]), ("😀😀😀😀😀", ["😀", "😀", "😀"])]
)
def test_korean_and_emoji_come_out_whole(llama, prompt, beginning):
    stream = llama.stream(prompt, 10, 0.0)
    pieces = list(stream)
    assert pieces[: len(beginning)] == beginning
    assert "".join(pieces) == llama.tokenizer.decode(stream.tokens)
    assert len(pieces) < len(stream.tokens) == 10, "no character was split among tokens; the prompt shows nothing"


@pytest.mark.parametrize("leave", [Stream.close, lambda stream: None], ids=["closed", "dropped"])
def test_breaking_off_leaves_the_model_as_it_was(shallow, leave):
    [expected] = shallow.text_completion([CAPITAL], 0.0, max_gen_len=4)
    stream = shallow.stream(CAPITAL, 20, 0.0)
    assert expected["generation"].startswith(next(stream))
    assert stream.finish_reason is None
    leave(stream)
    assert shallow.text_completion([CAPITAL], 0.0, max_gen_len=4) == [expected]


def test_a_closed_stream_makes_no_more(llama):
    stream = llama.stream(CAPITAL, 20, 0.0)
    next(stream)
    stream.close()
    assert list(stream) == []
    assert (stream.text, len(stream.tokens), stream.finish_reason) == (" Paris", 1, None)


def test_two_streams_run_side_by_side(shallow):
    alone = ["".join(shallow.stream(prompt, 6, 0.0)) for prompt in (CAPITAL, SUM)]
    one, other = (shallow.stream(prompt, 6, 0.0) for prompt in (CAPITAL, SUM))
    for pieces in zip(one, other, strict=True):
        assert all(pieces)
    assert [one.text, other.text] == alone and one.text != other.text


# ---- with a cache


@pytest.mark.parametrize("known", [0, 1, 5, 6])
def test_a_cache_that_holds_the_prompts_beginning_changes_nothing(shallow, known):
    ids = shallow.tokenizer.encode(CAPITAL, bos=True, eos=False)
    cache = new_cache(shallow.model, 1, 16)
    if known:
        list(shallow.stream(ids[:known], 1, 0.0, cache=cache))
    assert cache.longest == known
    alone, stream = shallow.stream(ids, 4, 0.0), shallow.stream(ids, 4, 0.0, cache=cache)
    assert "".join(stream) == "".join(alone)
    assert len(stream.tokens) == 4
    assert stream.row.logprobs == pytest.approx(alone.row.logprobs, abs=1e-4)
    assert cache.longest == len(ids) + 3  # all but the last token, which was not run


@pytest.mark.parametrize(("rows", "tokens"), [(1, 9), (2, 64)])
def test_a_cache_of_the_wrong_size_is_refused(llama, rows, tokens):
    with pytest.raises(RequestError, match=f"the cache has {rows} rows of {tokens} tokens, .* one row of 10"):
        llama.stream([1, 2, 3, 4], 6, cache=KVCache(llama.model.args, rows, tokens, dtype=llama.dtype))
