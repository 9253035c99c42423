"""Parse a model's answer: tool calls in any supported format, and the text around them.

Small models often miss the format that they were asked for, so every format is accepted for every
release. Nothing is evaluated, no model output raises an error, and the time is linear in the
answer's length.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from llama_ref.errors import RequestError
from llama_ref.formatting import short
from llama_ref.numbers import plain_list
from llama_ref.tokenizer import Tokenizer
from llama_ref.tools.answer import Answer, Call
from llama_ref.tools.formats import builtin, json_reader, python_reader
from llama_ref.tools.formats.json_reader import Found
from llama_ref.tools.toolset import ToolLike, ToolSet

PYTHON_TAG = "<|python_tag|>"
HEADER = re.compile(r"\s*<\|start_header_id\|>assistant<\|end_header_id\|>(?:\r?\n){0,2}")
END = re.compile(r"<\|(?:eom_id|eot_id|end_of_text)\|>\s*\Z")
SEPARATORS = " \t\r\n;,"


def parse_tool_calls(
    answer: str | Sequence[int], tools: ToolSet | Iterable[ToolLike] | None = None, *, tokenizer: Tokenizer | None = None
) -> Answer:
    """Parse the tool calls in an answer, given as text or as token ids (with their tokenizer).

    In ids, only the special token counts as `<|python_tag|>`, never those characters typed as text;
    in text, the characters count. An assistant header at the start and an end token are removed.
    `tools` are the tools that were offered: calls of others get `is_offered` False. Incomplete
    calls remain text, and `problems` says why. Raises RequestError only for arguments of the wrong
    type.
    """
    if isinstance(answer, str):
        header = HEADER.match(answer)
        segments = END.sub("", answer[header.end() if header else 0 :]).split(PYTHON_TAG)
    elif tokenizer is None:
        raise RequestError("parse_tool_calls needs the tokenizer for ids: parse_tool_calls(ids, tokenizer=llama.tokenizer)")
    elif not isinstance(ids := plain_list(answer), list):
        raise RequestError(f"the answer is {short(answer)}, expected a string or a list of token ids")
    else:
        segments = list(_segments(ids, tokenizer))
    parts = [_read(segment, after_tag=number > 0) for number, segment in enumerate(segments)]
    offered = None if tools is None else set(ToolSet.from_tools(tools).names)
    return Answer(
        tuple(_marked(call, offered) for part in parts for call in part.calls),
        "".join(part.text for part in parts),
        tuple(problem for part in parts for problem in part.problems),
    )


def _segments(ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The decoded texts before, between and after the python tags."""
    begin, end, tag = 0, len(ids), tokenizer.python_tag_id
    special_id = tokenizer.vocabulary.special_id
    if ids and ids[0] == special_id("<|start_header_id|>") and special_id("<|end_header_id|>") in ids:
        begin = ids.index(special_id("<|end_header_id|>")) + 1
        begin += ids[begin : begin + 1] == tokenizer.encode("\n\n", bos=False, eos=False)
    if end > begin and ids[end - 1] in tokenizer.stop_tokens:
        end -= 1
    for position in range(begin, end):
        if ids[position] == tag:
            yield tokenizer.decode(ids[begin:position])
            begin = position + 1
    yield tokenizer.decode(ids[begin:end])


def _read(text: str, after_tag: bool) -> Answer:
    """Parse one segment. After a python tag it is code, unless it begins with calls."""
    problems: list[str] = []
    if python_reader.looks_like_calls(text):
        try:
            return _answer(text, [Found(0, len(text), tuple(python_reader.read_calls(text)))])
        except python_reader.Malformed as error:
            problems.append(str(error))
    calls, end = builtin.read(text)
    if calls:
        return _answer(text, [Found(0, end, tuple(calls))])
    found = list(json_reader.find_calls(text))
    if after_tag and not (found and found[0].calls and not text[: found[0].start].strip()):
        return Answer((Call(builtin.CODE, {"code": text}),), "")
    return _answer(text, found, problems)


def _answer(text: str, found: Sequence[Found], problems: Sequence[str] = ()) -> Answer:
    """Collect the usable calls and the text outside them, without separators."""
    calls: list[Call] = []
    outside, position, problems = [], 0, list(problems)
    for part in found:
        usable = [call for call in map(_usable, part.calls) if call]
        if len(usable) < len(part.calls) or not part.calls:
            problems.append(part.problem or "a built-in tool is called without a string as its argument")
            continue
        calls += usable
        outside.append(text[position : part.start])
        position = part.end
    if not calls:
        return Answer((), text, tuple(problems))
    outside.append(text[position:])
    return Answer(tuple(calls), "".join(part for part in outside if part.strip(SEPARATORS)), tuple(problems))


def _usable(call: Call) -> Call | None:
    """The call, with a built-in tool's argument renamed.

    None if a built-in tool cannot take the arguments.
    """
    if call.name not in builtin.BUILTIN_ARGUMENT:
        return call
    arguments = builtin.renamed(call.name, call.arguments)
    return None if arguments is None else replace(call, arguments=arguments)


def _marked(call: Call, offered: set[str] | None) -> Call:
    return call if offered is None or call.name in offered else replace(call, is_offered=False)
