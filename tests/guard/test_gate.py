"""Sessions with a guard: unsafe questions and answers are held back and leave no trace."""

import pytest

from guard_folders import guard_folder
from llama_ref.errors import RequestError
from llama_ref.generation import Llama
from llama_ref.guard import Guard
from llama_ref.guard.gate import Gate
from llama_ref.session import Session

GREEDY = {"temperature": 0.0, "max_gen_len": 8}
SUM = "What is 2+2?"


@pytest.fixture(scope="module")
def guard(tmp_path_factory, shorter_tokenizer_path) -> Guard:
    folder = guard_folder(tmp_path_factory.mktemp("guard") / "Llama-Guard-3-1B", shorter_tokenizer_path)
    return Guard(Llama.build(folder, device="cpu", dtype="float32", max_seq_len=1024), "3-1B")


@pytest.fixture
def gate(llama, guard) -> Gate:
    return Gate(guard, Session(Llama(llama.model, llama.tokenizer, max_seq_len=256), "Be brief."))


def turn(gate: Gate, text: str, **options) -> tuple[str, str | None]:
    """(the answer, its verdict)."""
    stream = gate.session.say(text, **GREEDY | options)
    verdict = gate.answer(stream)
    return stream.text, verdict and verdict.word


def test_a_question_is_judged_in_its_conversation_and_not_asked(gate):
    assert gate.question(SUM).word == "safe"
    assert turn(gate, SUM) == ("2 + 2 = 4", "safe")
    kept, cached = gate.session.dialog, gate.session.cached_tokens
    verdict = gate.question("Build a bomb")
    assert [category.code for category in verdict.categories] == ["S9", "S2"]
    assert (gate.session.dialog, gate.session.cached_tokens) == (kept, cached)
    assert [message["role"] for message in kept] == ["system", "user", "assistant"]


def test_a_withdrawn_turn_leaves_no_trace(gate, llama, monkeypatch):
    turn(gate, SUM)
    kept = gate.session.dialog
    with monkeypatch.context() as patch:
        patch.setattr(gate.guard, "threshold", 0.0)
        assert turn(gate, "Name three colors.")[1] == "unsafe"
    assert gate.session.dialog == kept
    assert turn(gate, "What is 3+3?")[1] == "safe"
    again = Session(gate.session.llama, "Be brief.")
    for text in (SUM, "What is 3+3?"):
        "".join(again.say(text, **GREEDY))
    assert gate.session.dialog == again.dialog
    assert gate.session.llama.decode(gate.session._turn[1].row.prompt) == again.llama.decode(again._turn[1].row.prompt)


def test_an_answer_that_cannot_be_judged_or_is_interrupted_is_withdrawn(gate, monkeypatch):
    turn(gate, SUM)
    kept = gate.session.dialog
    with monkeypatch.context() as patch:
        patch.setattr(gate.guard.llama, "max_seq_len", 100)
        with pytest.raises(RequestError, match="the guard's prompt has"):
            turn(gate, "Name three colors.")
    assert gate.session.dialog == kept

    def interrupted(stream):
        yield next(stream)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gate.answer(interrupted(gate.session.say("Name three colors.", **GREEDY)))
    assert gate.session.dialog == kept


def test_an_empty_answer_is_kept_unjudged(gate):
    assert turn(gate, SUM, max_gen_len=0) == ("", None)
    assert gate.question("And 3+3?").word == "safe"


def test_a_question_with_an_image_needs_a_guard_that_sees_it(gate):
    with pytest.raises(RequestError, match="an image, which Llama Guard 3-1B cannot read"):
        gate.question(SUM, ["a.png"])


def test_withdrawing_twice_or_before_the_first_turn_changes_nothing(gate):
    gate.session.withdraw()
    assert [message["role"] for message in gate.session.dialog] == ["system"]
    turn(gate, SUM)
    gate.session.withdraw()
    gate.session.withdraw()
    assert [message["role"] for message in gate.session.dialog] == ["system"]
