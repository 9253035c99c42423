"""Parse calls in answers: Meta's documented examples, typical model output, and hostile input."""

import gc
import importlib.util
import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_ref.chat import ChatFormat
from llama_ref.errors import RequestError
from llama_ref.tools import ToolSet, parse_tool_calls
from llama_ref.tools.calls import calls_text
from llama_ref.tools.formats.names import TOOL_FORMATS
from meta_pages import printed_pairs

SEARCH = 'brave_search.call(query="tides")'
TIDES = ("brave_search", {"query": "tides"})


def calls(answer, **options) -> list[tuple[str, dict]]:
    return [(call.name, call.arguments) for call in parse_tool_calls(answer, **options).calls]


# ---- the documents

PRINTED = {
    "3.1": {
        2: [("brave_search", {"query": "latest price of 1oz gold"})],
        3: "code_interpreter",
        5: [("trending_songs", {"n": "10", "genre": "all"})],
        6: [("trending_songs", {"n": 10})],
    },
    "3.2": {
        1: [
            ("get_weather", {"city": "San Francisco", "metric": "celsius"}),
            ("get_weather", {"city": "Seattle", "metric": "celsius"}),
        ],
        2: [("get_user_info", {"user_id": 7890, "special": "black"})],
        3: "code_interpreter",
    },
}


@pytest.mark.parametrize("release", PRINTED)
def test_answers_on_metas_pages(release, tokenizer):
    pairs = printed_pairs(release)
    assert len(pairs) == {"3.1": 7, "3.2": 6}[release]
    for number, (_, answer) in enumerate(pairs):
        inner = re.sub(r"<\|(python_tag|eo[mt]_id)\|>", "", answer)
        expected = PRINTED[release].get(number, [])
        if expected == "code_interpreter":
            expected = [("code_interpreter", {"code": inner})]
        ids = tokenizer.encode(answer, bos=False, eos=False, allowed_special="all")
        for found in (parse_tool_calls(answer), parse_tool_calls(ids, tokenizer=tokenizer)):
            assert [(call.name, call.arguments) for call in found.calls] == expected
            assert (found.text, found.problems) == ("" if expected else inner, ())


# ---- round trips


NAMES = st.from_regex(r"[a-z][a-z_]{0,5}(\.[a-z]{1,3})?", fullmatch=True).map("my_{}".format)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(st.text(), VALUES, max_size=3)), min_size=1, max_size=3)


@pytest.mark.parametrize("form", TOOL_FORMATS)
@given(wanted=CALLS)
def test_any_calls_come_back(form, wanted):
    found = parse_tool_calls(calls_text(wanted, form))
    assert [(call.name, call.arguments) for call in found.calls] == wanted
    assert (found.text, found.problems) == ("", ())


@given(
    st.lists(
        st.tuples(st.sampled_from(["brave_search", "wolfram_alpha"]), st.fixed_dictionaries({"query": st.text()})), min_size=1
    )
)
def test_any_queries_come_back(wanted):
    assert calls(calls_text(wanted)) == wanted


@given(st.text())
def test_any_code_comes_back(tokenizer, code):
    ids = [tokenizer.python_tag_id, *tokenizer.encode(code, bos=False, eos=False), tokenizer.eom_id]
    text = tokenizer.decode(ids[1:-1])
    if not calls(text):
        assert calls(ids, tokenizer=tokenizer) == [("code_interpreter", {"code": text})]


def bfcl(kind: str) -> list[list[tuple[str, dict]]]:
    """One correct answer for each question of the Berkeley leaderboard."""
    folder = Path(next(iter(importlib.util.find_spec("bfcl_eval").submodule_search_locations))) / "data" / "possible_answer"
    lines = (folder / f"BFCL_v4_{kind}.json").read_text(encoding="utf-8").splitlines()
    return [
        [(name, first_of(given)) for call in json.loads(line)["ground_truth"] for name, given in call.items()] for line in lines
    ]


def first_of(allowed: dict[str, list]) -> dict:
    """The first allowed value of each argument, without optional ones (marked "")."""
    return {name: values[0] for name, values in allowed.items() if values[0] != ""}


@pytest.mark.parametrize("form", TOOL_FORMATS)
def test_answers_to_real_questions_come_back(form):
    answers = bfcl("simple_python") + bfcl("parallel")
    assert len(answers) == 600 and sum(map(len, answers)) > 900
    assert [answer for answer in answers if calls(calls_text(answer, form)) != answer] == []


# ---- what models write

F = ("f", {"a": 1})
DICT = '{"name": "f", "parameters": {}}'  # of a program
PARTS = {
    'Sure: {"name": "f", "parameters": {"a": 1}} Done.': ([F], "Sure:  Done."),
    '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "arguments": {}}': ([F, ("g", {})], ""),
    '{"name": "f", "arguments": "{\\"a\\": 1}"}': ([F], ""),
    '[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {}}]': ([F, ("g", {})], ""),
    '```json\n{"name": "f", "parameters": {"a": 1}}\n```': ([F], "```json\n\n```"),
    '<function=f>{"a": {"b": "it\'s"}}</function>': ([("f", {"a": {"b": "it's"}})], ""),
    '<function=f>{"a": 1}': ([F], ""),
    'I call <function=f>{"a": 1}</function> now <function=g>{}</function>': ([F, ("g", {})], "I call  now "),
    "[f(a=1), a.b(c=[1, {'k': -2.5}], d=(1, 2), e=null, f=true)]": (
        [F, ("a.b", {"c": [1, {"k": -2.5}], "d": [1, 2], "e": None, "f": True})],
        "",
    ),
    " [ f ( a = 1 , ) ]\n": ([F], ""),
    "[f(a=1)]<|eot_id|>": ([F], ""),
    "<|python_tag|>[f(a=1)]<|eom_id|>": ([F], ""),
    "<|start_header_id|>assistant<|end_header_id|>\n\n[f(a=1)]<|eot_id|>": ([F], ""),
    "[f(from='Oslo', text='a' \"b\", raw=r'\\n', long='''it's\nlong''')]": (
        [("f", {"from": "Oslo", "text": "ab", "raw": "\\n", "long": "it's\nlong"})],
        "",
    ),
    "[f(a='\\x41\\u00e9\\U0001f600\\101\\q')]": ([("f", {"a": "Aé😀A\\q"})], ""),
    f"<|python_tag|>{SEARCH}": ([TIDES], ""),
    f"{SEARCH}\n{SEARCH}": ([TIDES, TIDES], ""),
    'brave_search.call(query="say \\"hi\\" \\alpha")': ([("brave_search", {"query": 'say "hi" \\alpha'})], ""),
    "Let me see.<|python_tag|>print(1)": ([("code_interpreter", {"code": "print(1)"})], "Let me see."),
    '<|python_tag|>x = {"name": "f", "parameters": {}}': (
        [("code_interpreter", {"code": 'x = {"name": "f", "parameters": {}}'})],
        "",
    ),
    '{"type": "function", "name": "brave_search", "parameters": {"q": "tides"}}': ([TIDES], ""),
    "[brave_search(q='tides')]": ([TIDES], ""),
    "Hello.": ([], "Hello."),
    "[1, 2]": ([], "[1, 2]"),
    "[]": ([], "[]"),
    "": ([], ""),
    '{"a": 1}': ([], '{"a": 1}'),
    f"Write `{SEARCH}` to search.": ([], f"Write `{SEARCH}` to search."),
}


@pytest.mark.parametrize("answer", PARTS)
def test_calls_are_found_and_the_rest_is_text(answer):
    found = parse_tool_calls(answer)
    assert ([(call.name, call.arguments) for call in found.calls], found.text) == PARTS[answer]
    assert found.problems == ()


MALFORMED = {
    '{"name": "f"}': "expected an object",
    '{"name": "f", "parameters": []}': "expected an object",
    '{"name": "f", "arguments": "{"}': "a string that is not JSON",
    '{"name": "f", "parameters": {"a": 1': "invalid JSON",
    '[{"name": "f", "param': "invalid JSON",
    "<function=f></function>": "<function=f>: Expecting value",
    "<function=f>[1]</function>": "expected an object",
    '{"name": "f", "parameters": {"a": [NaN]}}': "a number that JSON cannot express",
    '{"name": "f", "arguments": "{\\"a\\": -1e999}"}': "a number that JSON cannot express",
    '<function=f>{"a": Infinity}</function>': "a number that JSON cannot express",
    "[f(a=b)]": "'b' is not a value",
    "[f(1)]": "'1' has no name",
    "[f(x)]": "'x' has no name",
    "[f(a=1, a=2)]": "'a' twice",
    "[f(a=1)": "found the end",
    "[f(a=1)] and more": "expected the end, found 'and'",
    "[f(a='x": "unexpected",
    "[f(a={1: 2})]": "a dict's key is",
    "[f(a={1, 2})]": "a dict's key is",
    "[f(a=1e999)]": "too large",
    "[f(a=1 + 1)]": "unexpected '+ 1)]'",
    "[f(a=__import__('os').system('id'))]": "is not a value",
    '{"name": "brave_search", "parameters": {"query": 5}}': "without a string",
    "[f(a=" + "9" * 5000 + ")]": "is not a number",
}


@pytest.mark.parametrize("answer", MALFORMED, ids=lambda answer: answer[:40])
def test_a_malformed_call_is_text_with_a_problem(answer):
    found = parse_tool_calls(answer)
    assert (found.calls, found.text) == ((), answer)
    assert MALFORMED[answer] in found.problems[0]


def test_a_whole_call_beside_a_broken_one_counts():
    answer = '{"name": "f", "parameters": {"a": 1}} {"name": "g", "para'
    found = parse_tool_calls(answer)
    assert [call.name for call in found.calls] == ["f"] and found.text == ' {"name": "g", "para' and found.problems
    assert calls('[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "para') == [F]


def test_other_names_than_those_offered_are_marked():
    found = parse_tool_calls("[f(), g()]", [{"name": "f"}, "brave_search"])
    assert [(call.name, call.is_offered) for call in found.calls] == [("f", True), ("g", False)]
    found = parse_tool_calls("<|python_tag|>1", ToolSet.from_tools(["brave_search"]))
    assert not found.calls[0].is_offered
    assert parse_tool_calls("[g()]").calls[0].is_offered and not parse_tool_calls("[g()]", []).calls[0].is_offered


def test_in_ids_only_the_special_token_is_the_tag(tokenizer):
    typed = tokenizer.encode("<|python_tag|>print(1)<|eom_id|>", bos=False, eos=False)
    found = parse_tool_calls(typed, tokenizer=tokenizer)
    assert (found.calls, found.text) == ((), "<|python_tag|>print(1)<|eom_id|>")
    header = ChatFormat(tokenizer).encode_header("assistant")
    two = [*header, tokenizer.python_tag_id, *typed, tokenizer.python_tag_id, tokenizer.eot_id]
    code = [{"code": "<|python_tag|>print(1)<|eom_id|>"}, {"code": ""}]
    assert [call.arguments for call in parse_tool_calls(two, tokenizer=tokenizer).calls] == code


@pytest.mark.parametrize("answer, message", [([1, 2], "needs the tokenizer"), (None, "needs the tokenizer")])
def test_a_wrong_argument_is_refused(answer, message):
    with pytest.raises(RequestError, match=message):
        parse_tool_calls(answer)


# ---- hostile answers

MEGABYTE = 1_000_000
HURTFUL = [
    *("[", "{", "[{", '{"a":', '{"name":', '[{"', '[{"name":[', '{  "', "[ ", "<function=a>", "<function=f>{", "<function="),
    *('{"name":"f","parameters":{}}', '{"a":1}', '{"name":1,', '{"name":"f"}', "<|python_tag|>", "<|eot_id|> "),
    *(
        SEARCH,
        'brave_search.call(query="',
        "[f(a=",
        "[f(a=(",
        "[f(),",
        "(",
        "-",
        "\\",
        '"',
        "'",
        "\n",
        " ",
        ";",
        "a.",
        "\ud800",
    ),
]
BEGINNINGS = [
    "",
    "[f(a=",
    "[f(a='",
    '[f(a="""',
    "[f(",
    "[f(a=1",
    '{"name":"f","parameters":{"a":',
    '{"name":"f","parameters":{"a":"',
    "<|python_tag|>",
]


@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize("unit", HURTFUL)
def test_time_is_linear_and_nothing_raises(beginning, unit):
    """Ten times the length takes at most 30 times as long (quadratic: 100), plus half a second."""

    def seconds(n_characters: int) -> float:
        answer = beginning + unit * (n_characters // len(unit))
        gc.disable()  # a full collection visits all objects of the test run, whenever their number grows by a quarter
        try:
            start = time.process_time()
            parse_tool_calls(answer)
            return time.process_time() - start
        finally:
            gc.enable()

    assert seconds(MEGABYTE // 2) < 30 * seconds(MEGABYTE // 20) + 0.5


@given(st.lists(st.sampled_from([*HURTFUL, *BEGINNINGS, *MALFORMED, *PARTS]), max_size=4).map("".join), st.text())
def test_whatever_a_model_writes_nothing_raises_and_nothing_is_lost(tokenizer, parts, text):
    answer = parts + text
    ids = [tokenizer.python_tag_id, *tokenizer.encode(answer, bos=False, eos=False), tokenizer.eom_id]
    for found in (parse_tool_calls(answer), parse_tool_calls(ids, tokenizer=tokenizer)):
        json.dumps([call.arguments for call in found.calls])
        assert found.calls or found.text or not answer.strip()
