"""A conversation that keeps its cache: cost, unchanged answers, state after an interrupt."""

import copy
import errno
import itertools
import json
import os
import pickle
from collections.abc import Callable

import pytest
from torch import Tensor

from llama_ref.chat import Dialog
from llama_ref.decoding import reading
from llama_ref.decoding.stream import Stream
from llama_ref.errors import RequestError
from llama_ref.generation import Llama
from llama_ref.model import Transformer, TransformerBlock
from llama_ref.session import Session

SUM, CAPITAL, HI = "What is 2+2?", "What is the capital of France?", "Say hi."
GREEDY = {"temperature": 0, "max_gen_len": 8}  # SUM is answered within 8 tokens, the others are cut off


def ask(session: Session, text: str, **options) -> str:
    return "".join(session.say(text, **GREEDY | options))


def question(llama: Llama, text: str) -> list[int]:
    """Ids of a user's message and the open header after it."""
    formatter = llama.formatter
    return formatter.encode_message({"role": "user", "content": text}) + formatter.encode_header("assistant")


def assert_same_at_once(llama: Llama, stream: Stream) -> None:
    """Check that the conversation's ids give this answer, as probably, without a cache."""
    list(stream)
    assert stream.tokens, "an empty answer shows nothing"
    [tokens], [logprobs] = llama.generate([stream.row.prompt], len(stream.tokens), 0.0, logprobs=True)
    assert stream.tokens == tokens
    assert stream.row.logprobs == pytest.approx(logprobs, abs=1e-4)


def without_cache(llama: Llama, dialog: Dialog, text: str) -> str:
    return llama.chat_completion([[*dialog, {"role": "user", "content": text}]], 0.0, max_gen_len=8)[0]["generation"]["content"]


@pytest.fixture(scope="module")
def small(llama) -> Llama:
    """A model with a short context, because a session allocates memory for all of it."""
    return Llama(llama.model, llama.tokenizer, max_seq_len=160)


@pytest.fixture(scope="module")
def quick(shallow) -> Llama:
    """A random model, whose answers mean nothing."""
    return Llama(shallow.model, shallow.tokenizer, max_seq_len=160)


@pytest.fixture
def passed(monkeypatch) -> list[int]:
    """Tokens that go through the model, per pass."""
    counts: list[int] = []
    hidden = Transformer.hidden

    def counting(model: Transformer, tokens: Tensor, cache=None) -> Tensor:
        counts.append(tokens.numel())
        return hidden(model, tokens, cache)

    monkeypatch.setattr(Transformer, "hidden", counting)
    return counts


@pytest.mark.parametrize(("model", "system"), [("small", None), ("quick", "You answer in one word.")])
def test_a_turn_costs_only_its_new_tokens_and_changes_nothing(model, system, passed, request):
    small: Llama = request.getfixturevalue(model)
    session = Session(small, system)
    ids = [small.tokenizer.bos_id]
    if system:
        ids += small.formatter.encode_message({"role": "system", "content": system})
    uncached = len(ids)
    for text, length in ((SUM, 8), (CAPITAL, 3), (HI, 2)):
        passed.clear()
        stream = session.say(text, **GREEDY | {"max_gen_len": length})
        said = "".join(stream)
        prefill, *decode = passed
        asked = question(small, text)
        assert prefill == uncached + len(asked)
        assert decode == [1] * (len(stream.tokens) - (stream.finish_reason == "length"))
        assert session.cached_tokens == len(ids) + len(asked) + len(decode)

        assert stream.row.prompt == ids + asked
        assert_same_at_once(small, stream)
        assert session.dialog[-2:] == [{"role": "user", "content": text}, {"role": "assistant", "content": said}]
        ids += [*asked, *stream.tokens, small.tokenizer.eot_id]
        uncached = len(ids) - session.cached_tokens  # the end mark, and the last token when it was cut off


def test_ids_stay_as_they_were_sampled(small):
    """Encoding sampled text again may give other tokens, which would not match the cache."""
    letter_by_letter = {small.tokenizer.encode(letter, bos=False, eos=False)[0]: 1e6 for letter in " F"}
    session = Session(small)
    stream = session.say(CAPITAL, **GREEDY | {"max_gen_len": 3}, logit_bias=letter_by_letter)
    said = "".join(stream)
    assert small.tokenizer.encode(said, bos=False, eos=False) != stream.tokens, "the sample shows nothing"
    ids = [small.tokenizer.bos_id, *question(small, CAPITAL), *stream.tokens, small.tokenizer.eot_id, *question(small, SUM)]
    assert session.say(SUM, **GREEDY).row.prompt == ids


# ---- answers that end early


def leave_by_close(session: Session) -> Stream:
    stream = session.say(CAPITAL, **GREEDY)
    next(stream), next(stream)
    stream.close()
    return stream


def leave_by_walking_away(session: Session) -> Stream:
    stream = session.say(CAPITAL, **GREEDY)
    next(stream), next(stream), next(stream)
    return stream


def leave_by_stop_string(session: Session) -> Stream:
    stream = session.say(CAPITAL, **GREEDY, stop=[" and,"])
    list(stream)
    return stream


def leave_by_stop_string_within_a_token(session: Session) -> Stream:
    stream = session.say(CAPITAL, **GREEDY, stop="(")
    list(stream)
    return stream


@pytest.mark.parametrize(
    "leave", [leave_by_close, leave_by_walking_away, leave_by_stop_string, leave_by_stop_string_within_a_token]
)
def test_an_answer_broken_off_stays_as_far_as_it_was_shown(quick, leave):
    """Uninterrupted, it would be " I I (  and, I I"."""
    session = Session(quick, "Be brief.")
    left = leave(session)
    assert "," not in left.text and len(left.tokens) < GREEDY["max_gen_len"], "it was not broken off"
    assert session.dialog[1:] == [{"role": "user", "content": CAPITAL}, {"role": "assistant", "content": left.text}]

    stream = session.say(HI, **GREEDY | {"max_gen_len": 2})
    assert_same_at_once(quick, stream)
    asked = [quick.tokenizer.eot_id, *question(quick, HI)]
    kept = stream.row.prompt[len(left.row.prompt) : -len(asked)]
    assert stream.row.prompt == [*left.row.prompt, *left.tokens[: len(kept)], *asked]
    texts = [quick.tokenizer.decode(left.tokens[:n]) for n in range(len(left.tokens) + 1)]
    assert texts[len(kept)] == max((text for text in texts if left.text.startswith(text)), key=len)


def test_looking_at_the_conversation_amid_an_answer_does_not_end_it(small):
    session = Session(small)
    seen = [session.dialog[-1]["content"] for _ in session.say(SUM, **GREEDY)]
    assert len(seen) > 5
    assert seen == sorted(seen, key=len) and seen[-1] == "2 + 2 = 4"


@pytest.mark.parametrize("begun", [False, True])
def test_an_answer_broken_off_before_its_first_token_never_was(quick, begun):
    session = Session(quick)
    ask(session, SUM)
    before = list(session.dialog)
    stream = session.say(CAPITAL, **GREEDY)
    if begun:
        stream.close()
    assert session.dialog == before
    assert_same_at_once(quick, session.say(HI, **GREEDY))
    assert list(stream) == [], "the left answer went on and wrote to the cache"


@pytest.mark.parametrize(("n_passes", "prefill_tokens"), [(0, 1024), (1, 8), (2, 1024)])
def test_an_interrupt_amid_the_layers_leaves_no_trace(quick, monkeypatch, n_passes, prefill_tokens):
    """Ctrl-C may come at any time, in prefill or decode, when half the layers have written."""
    monkeypatch.setattr(reading, "PREFILL_TOKENS", prefill_tokens)
    session = Session(quick)
    ask(session, SUM)
    stream = interrupt(session, CAPITAL, n_passes)
    assert [message["content"] for message in session.dialog[3:]] == [stream.text] * bool(stream.text)
    assert_same_at_once(quick, session.say(HI, **GREEDY))


def test_an_interrupt_amid_a_character_leaves_no_half_of_it(small):
    dialog = [{"role": "user", "content": "Write one emoji."}]
    [tokens], _ = small.generate([small.formatter.encode_dialog_prompt(dialog)], 5, 0.0)
    broken = next(n for n in range(len(tokens)) if small.tokenizer.decode(tokens[:n]).endswith("\ufffd"))
    session = Session(small)
    stream = interrupt(session, "Write one emoji.", broken)
    assert stream.tokens == tokens[:broken]
    assert "\ufffd" not in session.dialog[-1]["content"]
    after = session.say(HI, **GREEDY | {"max_gen_len": 2})
    assert "\ufffd" not in small.tokenizer.decode(after.row.prompt)
    assert_same_at_once(small, after)


def interrupt(session: Session, text: str, n_passes: int) -> Stream:
    """Ask, and get a KeyboardInterrupt in the middle of a pass, after this many passes."""
    with pytest.MonkeyPatch.context() as patch:
        n_layers = len(session.llama.model.layers)
        at = n_passes * n_layers + n_layers // 2
        patch.setattr(TransformerBlock, "forward", interrupted_at(at, TransformerBlock.forward))
        stream = session.say(text, **GREEDY | {"max_gen_len": 12})
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    return stream


def interrupted_at(n: int, forward: Callable) -> Callable:
    calls = 0

    def interrupted(*args) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == n:
            raise KeyboardInterrupt
        return forward(*args)

    return interrupted


@pytest.mark.parametrize(("name", "stop_reason"), [("eot_id", None), ("eos_id", None), ("eom_id", "end_of_message")])
def test_the_end_mark_goes_into_the_conversation(quick, name, stop_reason):
    token = getattr(quick.tokenizer, name)
    session = Session(quick)
    assert ask(session, HI, logit_bias={token: 1e6}) == ""
    assert session.dialog[-1].get("stop_reason") == stop_reason
    dialog = [*session.dialog, {"role": "user", "content": SUM}]
    assert session.say(SUM, **GREEDY).row.prompt == quick.formatter.encode_dialog_prompt(dialog)


# ---- reset


@pytest.mark.parametrize("n_pieces", [0, 1, None])
def test_a_withdrawn_turn_never_was(quick, n_pieces):
    session, other = Session(quick), Session(quick)
    for each in (session, other):
        ask(each, SUM)
    kept = session.dialog
    list(itertools.islice(session.say(CAPITAL, **GREEDY), n_pieces))
    session.withdraw()
    assert session.dialog == kept
    streams = [each.say(HI, **GREEDY) for each in (session, other)]
    assert streams[0].row.prompt == streams[1].row.prompt
    assert_same_at_once(quick, streams[0])


def test_reset_and_system_prompts(quick):
    session = Session(quick, "Be brief.")
    assert session.system == "Be brief."
    first = ask(session, SUM)
    session.reset(session.system)
    assert (session.dialog, session.cached_tokens) == ([{"role": "system", "content": "Be brief."}], 0)
    assert ask(session, SUM) == first
    session.reset()
    assert (session.dialog, session.system) == ([], None)
    assert ask(session, SUM) == without_cache(quick, [], SUM)


def test_reset_amid_an_answer_ends_it(quick):
    session = Session(quick)
    stream = session.say(CAPITAL, **GREEDY)
    next(stream)
    session.reset()
    assert list(stream) == []
    assert (session.dialog, session.cached_tokens) == ([], 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": -1}, "temperature"), ({"stop": ""}, "stop is"), ({"max_gen_len": -1}, "max_gen_len")],
)
def test_a_refused_turn_leaves_the_conversation_as_it_was(small, options, message):
    session = Session(small, "Be brief.")
    with pytest.raises(RequestError, match=message):
        session.say(SUM, **options)
    assert [entry["role"] for entry in session.dialog] == ["system"]


def test_a_conversation_that_outgrows_the_context_is_refused_and_stays(shallow):
    tight = Llama(shallow.model, shallow.tokenizer, max_seq_len=64)
    session = Session(tight)
    ask(session, SUM)
    before, cached = list(session.dialog), session.cached_tokens
    with pytest.raises(RequestError, match=r"would have \d+ tokens, but max_seq_len is 64: /reset it"):
        session.say("word " * 60)
    assert (session.dialog, session.cached_tokens) == (before, cached)
    assert ask(session, HI) == without_cache(tight, before, HI)


def test_an_answer_that_fills_the_context_is_the_last(shallow):
    tight = Llama(shallow.model, shallow.tokenizer, max_seq_len=40)
    session = Session(tight)
    stream = session.say(CAPITAL, temperature=0)
    list(stream)
    assert stream.finish_reason == "length" and len(stream.row.prompt) + len(stream.tokens) == 40
    with pytest.raises(RequestError, match="max_seq_len is 40"):
        session.say(HI)
    assert len(session.dialog) == 2
    session.reset()
    assert ask(session, SUM) == without_cache(tight, [], SUM)


# ---- files


def test_a_saved_conversation_goes_on_elsewhere(quick, tmp_path):
    session = Session(quick, "한국어로 짧게.")
    ask(session, SUM)
    ask(session, HI, logit_bias={quick.tokenizer.eom_id: 1e6})
    session.save(tmp_path / "talk.json")
    saved = (tmp_path / "talk.json").read_text(encoding="utf-8")
    assert json.loads(saved) == session.dialog
    assert "한국어로" in saved, "a reader should see text, not escapes"

    other = Session(quick)
    other.load(tmp_path / "talk.json")
    assert (other.dialog, other.system) == (session.dialog, "한국어로 짧게.")
    assert ask(other, CAPITAL) == without_cache(quick, session.dialog, CAPITAL)


def test_a_lone_surrogate_survives_saving(quick, tmp_path):
    """A byte that is not UTF-8, as a terminal in the C locale gives it."""
    session = Session(quick)
    ask(session, "a\udcffb", max_gen_len=1)
    session.save(tmp_path / "talk.json")
    other = Session(quick)
    other.load(tmp_path / "talk.json")
    assert other.dialog == session.dialog


BAD_FILES = {
    "not JSON": b"hello",
    "cut short": b'[{"role": "user", "content": "a"}',
    "an object": b'{"role": "user", "content": "a"}',
    "a list of something else": b"[1, 2]",
    "a message without content": b'[{"role": "user"}]',
    "an unknown role": b'[{"role": "root", "content": "a"}]',
    "content that is no text": b'[{"role": "user", "content": null}]',
    "not UTF-8": b'["\xff"]',
    "nested too deep": b"[" * 100_000,
    "empty": b"",
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_conversation_leaves_the_session_as_it_was(small, tmp_path, content):
    (tmp_path / "talk.json").write_bytes(content)
    session = Session(small, "Be brief.")
    with pytest.raises(RequestError):
        session.load(tmp_path / "talk.json")
    assert session.dialog == [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize("method", [Session.load, Session.save])
def test_a_pipe_or_a_device_is_refused_at_once(small, tmp_path, method):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(RequestError, match="plain file"):
            method(Session(small), path)


def test_a_full_disk_leaves_the_saved_conversation(small, tmp_path, monkeypatch):
    path = tmp_path / "talk.json"
    Session(small, "Be brief.").save(path)
    before = path.read_bytes()

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RequestError, match=r"cannot write .*talk.json: No space left on device"):
        Session(small, "Be long.").save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", ["{tmp}", "{tmp}/none/talk.json", "a\0b", "~nobody-of-this-name/talk.json"])
@pytest.mark.parametrize("method", [Session.load, Session.save])
def test_a_file_that_cannot_be_used_is_named(small, tmp_path, method, path):
    path = path.format(tmp=tmp_path)
    with pytest.raises(RequestError) as caught:
        method(Session(small), path)
    assert path in str(caught.value)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda session: pickle.loads(pickle.dumps(session))], ids=["copy", "pickle"])
def test_a_copied_conversation_goes_its_own_way(peaked, copied):
    session = Session(Llama(peaked.model, peaked.tokenizer, max_seq_len=160))
    first = ask(session, "a", stop="zz")
    branch = copied(session)
    assert branch.dialog == session.dialog and branch.dialog[-1]["content"] == first
    assert ask(branch, "b") == ask(session, "b")
    ask(branch, "c")
    assert len(branch.dialog) == len(session.dialog) + 2 == 6
