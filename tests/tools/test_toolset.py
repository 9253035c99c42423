"""Tools are written as in Meta's documents and as by llama-stack's generators."""

import datetime
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_ref.args import ModelArgs
from llama_ref.chat import ChatFormat
from llama_ref.checkpoint.releases import RELEASES
from llama_ref.errors import RequestError
from llama_ref.tools import Parameter, Tool, ToolSet, tool_output
from llama_ref.tools.formats import builtin, function_tag, json_form, python_list
from llama_ref.tools.formats.names import default_format, untrained
from llama_stack_prompts import definitions, prompts
from meta_pages import printed_pairs

SONGS = Tool(
    "trending_songs",
    "Returns the trending songs on a Music site",
    (
        Parameter("n", {"type": "int", "description": "The number of songs to return"}),
        Parameter("genre", {"type": "str", "description": "The genre of the songs to return"}, is_required=False),
    ),
)
WEATHER = {
    "name": "get_weather",
    "description": "Get weather info for places",
    "parameters": {
        "type": "dict",
        "required": ["city"],
        "properties": {
            "city": {"type": "string", "description": "The name of the city to get the weather for"},
            "metric": {
                "type": "string",
                "description": "The metric for weather. Options are: celsius, fahrenheit",
                "default": "celsius",
            },
        },
    },
}
SYSTEM = {"role": "system", "content": "You are a helpful assistant.\n"}  # with the pages' final line break


@pytest.fixture(scope="module")
def chat(tokenizer) -> ChatFormat:
    return ChatFormat(tokenizer)


def written(chat, dialog, tools) -> str:
    return chat.tokenizer.decode(chat.encode_dialog_prompt(dialog, tools)).rstrip("\n")


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def as_generated(chat, text: str) -> dict:
    """Decode the message in an answer printed on a page."""
    ids = chat.tokenizer.encode(text, bos=False, eos=False, allowed_special="all")
    return chat.decode_assistant_message(ids, tools=ToolSet.from_tools(["wolfram_alpha", WEATHER]))


# ---- the documents


def test_prompts_of_3_1_are_those_on_the_page(chat):
    _, _, search, code, interaction, as_json, tagged = [prompt for prompt, _ in printed_pairs("3.1")]
    queried = ToolSet.from_tools(["brave_search", "wolfram_alpha"])
    on_a_day = ToolSet.from_tools(queried, today=datetime.date(2024, 9, 21))
    assert search == written(chat, [SYSTEM, user("Search the web for the latest price of 1oz gold?")], on_a_day)
    question = "Write code to check if number is prime, use that to see if the number 7 is prime"
    assert code == written(chat, [user(question)], ToolSet.from_tools(["code_interpreter"]))
    songs = [SYSTEM, user("Use tools to get latest trending songs")]
    assert as_json == written(chat, songs, ToolSet.from_tools([SONGS], "json", today="21 September 2024"))
    assert tagged == written(chat, songs, ToolSet.from_tools([SONGS], "function_tag", today="21 September 2024"))

    call = re.search(r"<\|python_tag\|>wolfram.*?<\|eom_id\|>", interaction)[0]
    result = re.search(r"ipython<\|end_header_id\|>\n\n(.*?)<\|eot_id\|>", interaction, re.DOTALL)[1]
    dialog = [user("What is the 100th decimal of pi?"), as_generated(chat, call), {"role": "tool", "content": result}]
    ours = written(chat, dialog, queried)
    assert interaction == ours.replace("wolfram_alpha<|eot_id|>", "wolfram_alpha\n<|eot_id|>")  # we add no line break


def test_prompts_of_3_2_are_those_on_the_page(chat):
    _, zero_shot, _, code, interaction, _ = [prompt for prompt, _ in printed_pairs("3.2")]
    tools = ToolSet.from_tools([WEATHER], "python_list")
    assert zero_shot == written(chat, [user("What is the weather in SF and Seattle?")], tools)
    call = '<|python_tag|>[get_weather(city="San Francisco", metric="celsius")]<|eot_id|>'
    dialog = [user("What is the weather in SF?"), as_generated(chat, call), {"role": "tool", "content": '"25 C"'}]
    assert interaction == written(chat, dialog, tools)
    question = "Write code to check if number is prime. Use it to verify if number 7 is prime"
    ours = written(chat, [user(question)], ToolSet.from_tools(["code_interpreter"], today="24 September 2024"))
    assert code == ours.replace("2024<|eot_id|>", "2024\n<|eot_id|>")  # we add no line break


# ---- llama-stack's generators

PLAIN = st.text(st.characters(categories=["L", "N"]) | st.sampled_from(" .,:;!?()[]-_/"), min_size=1)
WORD = st.from_regex(r"[a-z][a-z_0-9]{0,9}", fullmatch=True)
KINDS = st.sampled_from(["int", "str", "float", "bool"])


@st.composite
def definitions_of(draw, texts=PLAIN):
    """Tools with parameters: without any, llama-stack writes a line break between brackets."""
    out = []
    for name in draw(st.lists(WORD, min_size=1, max_size=3, unique=True)):
        parameters = {
            key: definitions.ToolParamDefinition(param_type=draw(KINDS), description=draw(texts), required=draw(st.booleans()))
            for key in draw(st.lists(WORD, min_size=1, max_size=3, unique=True))
        }
        out.append(definitions.ToolDefinition(tool_name=f"my_{name}", description=draw(texts), parameters=parameters))
    return out


def ours(definition) -> Tool:
    return Tool(
        definition.tool_name,
        definition.description,
        tuple(
            Parameter(name, {"type": each.param_type, "description": each.description}, each.required)
            for name, each in definition.parameters.items()
        ),
    )


@given(definitions_of())
def test_plain_definitions_are_written_as_by_llama_stack(tools):
    assert json_form.describe(list(map(ours, tools))) == prompts.JsonCustomToolGenerator().gen(tools).render()


@given(definitions_of(st.text(st.characters(max_codepoint=126, categories=["L", "N"]), min_size=1)))
def test_plain_tags_are_written_as_by_llama_stack(tools):
    """For ASCII only: llama-stack escapes other letters in parameters."""
    assert function_tag.describe(list(map(ours, tools))) == prompts.FunctionTagCustomToolGenerator().gen(tools).render()


@given(definitions_of())
def test_lists_hold_what_llama_stacks_hold(tools):
    """llama-stack's sentences are newer than the documents', and its `required` is on one line.

    The JSON is the same.
    """
    theirs = prompts.PythonListCustomToolGenerator().gen(tools).render()
    text = python_list.describe(list(map(ours, tools)))
    assert json_list(text) == json_list(theirs)
    folded = re.sub(r'"required": (\[.*?\])', lambda found: f'"required": {json.dumps(json.loads(found[1]))}', text, flags=re.S)
    assert folded[folded.index("Here is a list") :] in theirs


def json_list(text: str) -> list:
    start = text.index("[\n")
    return json.JSONDecoder().raw_decode(text, start)[0]


@pytest.mark.parametrize(
    "names", [["code_interpreter"], ["brave_search"], ["brave_search", "wolfram_alpha"], ["wolfram_alpha", "code_interpreter"]]
)
def test_the_environment_is_llama_stacks(names):
    tools = [definitions.ToolDefinition(tool_name=name) for name in names]
    assert builtin.describe(names) == prompts.BuiltinToolGenerator().gen(tools).render()


def test_the_dates_are_llama_stacks():
    today = datetime.datetime.now()
    system = ToolSet.from_tools([], today=today).write([])[0]["content"]
    assert system == prompts.SystemDefaultGenerator().gen().render()


@pytest.mark.parametrize("stdout", ["", '{"results": [1]}'])
@pytest.mark.parametrize("stderr", ["", "no connection"])
@pytest.mark.parametrize("status", ["success", "failure"])
def test_outputs_are_llama_stacks(status, stdout, stderr):
    theirs = prompts.ToolResponseGenerator().gen(status, stdout or None, stderr or None).render()
    assert tool_output(stdout, stderr, failed=status == "failure") == theirs


# ---- cases that the reference generators do not cover


@given(st.text(), st.text(), st.dictionaries(st.text(min_size=1), st.text(), max_size=3))
def test_any_text_is_whole_json_in_the_prompt(description, about, texts):
    properties = {name: {"type": "string", "description": text, "enum": [text, about]} for name, text in texts.items()}
    tool = Tool.from_schema({"name": "f", "description": description, "parameters": {"properties": properties}})
    in_list = json_list(python_list.describe([tool]))
    assert in_list[0]["description"] == description and in_list[0]["parameters"]["properties"] == properties
    text = json_form.describe([tool])
    inner = json.loads(text[text.index("{\n") : text.rindex("}") + 1])["function"]
    assert inner["description"] == description and inner["parameters"]["required"] == []
    assert {name: each["description"] for part in inner["parameters"]["properties"] for name, each in part.items()} == texts


def test_the_text_of_a_system_message_comes_last_to_the_letter():
    text = "  Réponds en français. \n"
    for form in ("json", "function_tag", "python_list"):
        for tools in (["brave_search"], [SONGS], ["code_interpreter", SONGS]):
            messages = ToolSet.from_tools(tools, form, today="1 May 2024").write(
                [{"role": "system", "content": text}, user("?")]
            )
            assert messages[0]["content"].endswith("\n\n" + text) and messages[-1] == user("?")
            assert [message["role"] for message in messages].count("system") == 1
    items = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    [message] = ToolSet.from_tools(["code_interpreter"]).write([{"role": "system", "content": items}])
    assert message["content"] == "Environment: ipython\n\nab"


def test_no_tools_change_nothing(chat):
    dialog = [SYSTEM, user("?")]
    assert ToolSet.from_tools([]).write(dialog) == dialog and chat.offered([]) is chat.offered(None) is None
    assert chat.encode_dialog_prompt(dialog, ToolSet.from_tools([])) == chat.encode_dialog_prompt(dialog)


def test_an_instruction_takes_the_place_of_metas():
    tools = ToolSet.from_tools([WEATHER], "python_list", instruction="Call sparingly.")
    assert tools.write([])[0]["content"].startswith("Call sparingly.\n\nHere is a list of functions")


def test_metas_shape_of_properties_is_read():
    text = json_form.describe([SONGS])
    shown = json.loads(text[text.index("{\n") : text.rindex("}") + 1])
    again = Tool.from_schema(shown)
    assert again.name == SONGS.name and again.required == ["n"] and [each.name for each in again.parameters] == ["n", "genre"]


@pytest.mark.parametrize(
    "tools, message",
    [
        ("brave_search", "expected a list of functions"),
        ({"name": "f"}, "expected a list of functions"),
        (5, "expected a list of functions"),
        (["google"], "'google' is not a built-in tool"),
        ([5], "a tool is 5, expected a function"),
        ([{"description": "?"}], "expected an object like"),
        ([{"name": ""}], "expected a non-empty string"),
        ([{"name": 5}], "expected a non-empty string"),
        ([{"name": "f", "description": 5}], "the description of f is 5, expected a string"),
        ([{"name": "f", "parameters": []}, {"name": "f"}], "two tools are named 'f'"),
        ([{"name": "f", "parameters": "x"}], "the parameters of 'f' are 'x', expected an object"),
        ([{"name": "f", "parameters": {"properties": "x"}}], "properties of 'f'"),
        ([{"name": "f", "parameters": {"properties": {"x": "int"}}}], "parameter 'x' of f is 'int', expected an object"),
        ([{"name": "f", "parameters": {"properties": {"x": {"default": b"1"}}}}], "cannot be written as JSON"),
        ([{"name": "f", "parameters": {"required": ["x"]}}], "requires 'x'"),
        ([{"name": "f", "parameters": {"required": "x"}}], "required of 'f' is 'x', expected a list"),
        ([{"name": "brave_search"}], "'brave_search' is a built-in tool"),
    ],
)
def test_tools_that_cannot_be_offered_are_refused(tools, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        ToolSet.from_tools(tools)


def test_names_that_a_form_cannot_hold_are_refused():
    for form, name in (("python_list", "get weather"), ("function_tag", "a>b")):
        with pytest.raises(RequestError, match=re.escape(repr(name))):
            ToolSet.from_tools([{"name": name}], form).write([])
    with pytest.raises(RequestError, match="unknown tool_format 'xml'"):
        ToolSet.from_tools([], "xml")
    with pytest.raises(RequestError, match="today is 2024, expected a string"):
        ToolSet.from_tools([], today=2024)


def test_a_message_that_is_wrong_is_counted_without_the_tools(chat):
    for tools in (ToolSet.from_tools([WEATHER]), [WEATHER, "brave_search"]):
        with pytest.raises(RequestError, match="message 1 of the dialog"):
            chat.encode_dialog_prompt([user("?"), {"role": "user"}], tools)
    with pytest.raises(RequestError, match="at least one message"):
        chat.encode_dialog_prompt([], [WEATHER])


# ---- releases


def test_each_release_has_the_form_of_metas_documents():
    expected = {"3.1": "json", "3.2": "python_list", "3.3": "python_list"}
    for name, release in RELEASES.items():
        if "Guard" in name:  # Llama Guard rates dialogs and calls no tools
            continue
        args = ModelArgs.from_dict(dict(release.params))
        minor = re.search(r"3\.\d", name)
        if minor is None or not args.use_scaled_rope:
            assert untrained(args) and default_format(args) == "json", name
            continue
        form = "json" if "vision_chunk_size" in release.params else expected[minor[0]]
        assert default_format(args, f"/models/llama-3.3/{release.folder}") == form, name
        assert untrained(args) is None
