"""Conversations with tool calls and results, with `chat_completion`, `stream` and `Session`."""

import json
import logging

import pytest

from llama_ref.chat import ChatFormat
from llama_ref.errors import RequestError
from llama_ref.session import Session
from llama_ref.tools import ToolSet
from scripted import scripted


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


QUESTION = {"role": "user", "content": "What is 2 + 3?"}
CALL = "Let me add. <|python_tag|>[add( a=2,b = 3), mul(a=1)]<|eom_id|>"  # spaced differently from how we write it
CALLS = [
    {"tool_name": "add", "arguments": {"a": 2, "b": 3}},
    {"tool_name": "mul", "arguments": {"a": 1}, "is_offered": False},
]


def ids_of(llama, text: str) -> list[int]:
    return llama.tokenizer.encode(text, bos=False, eos=False, allowed_special="all")


def test_an_answer_has_its_calls_and_goes_back_as_it_was_made(shallow, monkeypatch):
    llama = scripted(shallow, [CALL, "It is 5.<|eot_id|>"], monkeypatch)
    [first] = llama.chat_completion([[QUESTION]], tools=[add], tool_format="python_list")
    answer = first["generation"]
    assert answer == {
        "role": "assistant",
        "content": "Let me add. ",
        "tool_calls": CALLS,
        "stop_reason": "end_of_message",
        "token_ids": ids_of(llama, CALL),
    }
    kept = json.loads(json.dumps(answer))
    formatter = llama.formatter
    assert formatter.encode_message(kept) == formatter.encode_header("assistant") + ids_of(llama, CALL)
    dialog = [QUESTION, kept, {"role": "tool", "content": "5"}, {"role": "tool", "content": "no mul"}]
    [second] = llama.chat_completion([dialog], tools=[add])
    assert second["generation"]["content"] == "It is 5." and "tool_calls" not in second["generation"]
    assert second["generation"]["stop_reason"] == "end_of_turn"


def test_an_edited_answer_is_encoded_as_it_now_reads(chat, tokenizer):
    ids = tokenizer.encode(CALL, bos=False, eos=False, allowed_special="all")
    message = chat.decode_assistant_message(ids, tools=ToolSet.from_tools([add]))
    header = chat.encode_header("assistant")
    assert chat.encode_message(message) == header + ids
    for change in ({"content": "Well."}, {"tool_calls": CALLS[:1]}, {"tool_calls": []}):
        edited = chat.encode_message(message | change, "python_list")
        assert edited != header + ids
        assert edited == chat.encode_message({k: v for k, v in (message | change).items() if k != "token_ids"}, "python_list")
    with pytest.raises(RequestError, match="token_ids is a list"):
        chat.encode_message(message | {"token_ids": "ids"})
    with pytest.raises(RequestError, match="not a token id"):
        chat.encode_message(message | {"token_ids": [10**9]})


@pytest.fixture
def chat(tokenizer) -> ChatFormat:
    return ChatFormat(tokenizer)


def test_an_answer_cut_off_ends_its_turn_when_it_goes_back(shallow, monkeypatch):
    llama = scripted(shallow, [CALL], monkeypatch)
    [prediction] = llama.chat_completion([[QUESTION]], max_gen_len=9, tools=[add])
    answer = prediction["generation"]
    assert answer["stop_reason"] == "out_of_tokens" and len(answer["token_ids"]) == 9
    assert llama.formatter.encode_message(answer)[-10:] == [*answer["token_ids"], llama.tokenizer.eot_id]


def test_without_tools_answers_have_metas_shape(shallow, monkeypatch):
    llama = scripted(shallow, ["[f()]<|eot_id|>"] * 2, monkeypatch)
    for tools in (None, []):
        [prediction] = llama.chat_completion([[QUESTION]], tools=tools)
        assert prediction == {"generation": {"role": "assistant", "content": "[f()]"}}


def test_what_a_models_own_form_cannot_write_is_written_as_json(tokenizer):
    formatter = ChatFormat(tokenizer, tool_format="python_list")
    text = '{"type": "function", "name": "f g", "parameters": {"a": 1}}'
    ids = [*tokenizer.encode(text, bos=False, eos=False), tokenizer.eot_id]
    message = formatter.decode_assistant_message(ids)
    assert message["tool_calls"] == [{"tool_name": "f g", "arguments": {"a": 1}}]
    assert formatter.encode_message(message) == [*formatter.encode_header("assistant"), *ids]


def test_a_stream_offers_tools_in_a_dialog_only(shallow, monkeypatch):
    llama = scripted(shallow, [CALL], monkeypatch)
    stream = llama.stream([QUESTION], tools=[add])
    assert "".join(stream) == "Let me add. <|python_tag|>[add( a=2,b = 3), mul(a=1)]"
    message = llama.formatter.decode_assistant_message(stream.answer_tokens, tools=ToolSet.from_tools([add]))
    assert message["tool_calls"] == CALLS
    assert stream.row.prompt == llama.formatter.encode_dialog_prompt([QUESTION], ToolSet.from_tools([add], "json"))
    with pytest.raises(RequestError, match="tools are offered in a dialog"):
        llama.stream("What?", tools=[add])


def test_a_warning_for_models_that_know_no_tools_is_logged_once(shallow, monkeypatch, caplog):
    llama = scripted(shallow, ["Five.<|eot_id|>"] * 2, monkeypatch)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            llama.chat_completion([[QUESTION]], tools=[add])
    assert [record.message[:47] for record in caplog.records] == ["this model was not trained to call tools, as it"]


# ---- Session


def test_a_session_goes_on_with_results_and_computes_only_what_is_new(shallow, monkeypatch, tmp_path):
    llama = scripted(shallow, [CALL, "It is 5.<|end_of_text|>", "Bye.<|eot_id|>"], monkeypatch)
    session = Session(llama, "Be brief.", tools=[add], tool_format="function_tag")
    first = session.say(QUESTION["content"])
    list(first)
    assert session.tool_calls == CALLS
    said = first.row.prompt + ids_of(llama, CALL)
    second = session.say_results("5", "no mul")
    assert session.cached_tokens == len(said) - 1  # the end token was not computed
    assert "".join(second) == "It is 5." and session.tool_calls == []
    assert second.row.prompt[: len(said)] == said
    list(session.say("Thanks"))
    roles = [message["role"] for message in session.dialog]
    assert roles == ["system", "user", "assistant", "tool", "tool", "assistant", "user", "assistant"]
    assert session.dialog[0]["content"] == session.system == "Be brief."

    # The whole dialog, encoded again, gives the ids that went through the model.
    again = llama.formatter.encode_messages(session.dialog[:-1], session.tools)
    assert third_prompt(session) == again + llama.formatter.encode_header("assistant")
    session.save(tmp_path / "talk.json")
    other = Session(llama, tools=[add], tool_format="function_tag")
    other.load(tmp_path / "talk.json")
    assert other.dialog == session.dialog
    assert llama.formatter.encode_messages(other.dialog, other.tools) == other._ids


def third_prompt(session: Session) -> list[int]:
    return session._turn[1].row.prompt


def test_results_need_a_text_each(shallow, monkeypatch):
    session = Session(scripted(shallow, [CALL], monkeypatch), tools=[add])
    list(session.say("?"))
    with pytest.raises(RequestError, match="no results"):
        session.say_results()
    with pytest.raises(RequestError, match="'content'"):
        session.say_results(5)


def test_a_call_is_seen_without_tools_too(shallow, monkeypatch):
    session = Session(scripted(shallow, ['<|python_tag|>brave_search.call(query="tides")<|eom_id|>'], monkeypatch))
    assert session.tool_calls == []
    list(session.say("?"))
    assert session.tool_calls == [{"tool_name": "brave_search", "arguments": {"query": "tides"}}]
    assert "token_ids" not in session.dialog[-1]
