"""Llama 3's chat format: each message has a header, text, tool calls and an end token."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from llama_ref.errors import RequestError
from llama_ref.tokenizer import Tokenizer
from llama_ref.tools.answer import Call
from llama_ref.tools.calls import calls_text
from llama_ref.tools.formats.builtin import BUILTIN_ARGUMENT, CODE
from llama_ref.tools.formats.names import ToolFormat
from llama_ref.tools.parsing import parse_tool_calls
from llama_ref.tools.toolset import ToolLike, ToolSet

if TYPE_CHECKING:
    from llama_ref.images import ImageSource

logger = logging.getLogger(__name__)

Role = Literal["system", "user", "assistant", "tool", "ipython"]
StopReason = Literal["end_of_turn", "end_of_message", "out_of_tokens"]

WRITTEN_ROLE = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython", "ipython": "ipython"}
NO_IMAGES = "this model reads no images; use a vision release, such as Llama3.2-11B-Vision-Instruct"
STOP_REASONS = ("end_of_turn", "end_of_message", "out_of_tokens")


__all__ = [
    "BUILTIN_ARGUMENT",  # from llama_ref.tools
    "ChatFormat",
    "ContentItem",
    "Dialog",
    "ImageItem",
    "Message",
    "Role",
    "StopReason",
    "TextItem",
    "ToolCall",
    "parse_tool_call",
    "tool_call_text",
]


class _NameAndArguments(TypedDict):
    tool_name: str
    arguments: dict[str, Any] | str


class ToolCall(_NameAndArguments, total=False):
    """A tool call. Built-in tools take {"query": str}, code_interpreter takes {"code": str}.

    `is_offered` is present (and False) only if the model called a tool that was not offered.
    """

    is_offered: bool


class TextItem(TypedDict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ImageItem(TypedDict):
    """An image within a message: a path, a file's bytes, or a Pillow image."""

    type: Literal["image"]
    image: "ImageSource"


ContentItem = TextItem | ImageItem


class _RoleAndContent(TypedDict):
    role: Role
    content: str | list[ContentItem]


class Message(_RoleAndContent, total=False):
    """One message of a dialog. Only an assistant's has tool_calls and stop_reason, only a user's images.

    The stop_reason end_of_message means that the assistant waits for a tool's result. `token_ids`
    are the ids that the model generated; a message that still matches them is encoded as these.
    """

    tool_calls: list[ToolCall]
    stop_reason: StopReason | None
    token_ids: list[int]


Dialog = list[Message]


class ChatFormat:
    """Encodes dialogs as token ids and decodes generated ids into messages.

    Text never becomes a special token, and nothing is stripped. Malformed dialogs (empty, an
    unknown role, content that is missing or neither text nor items) raise RequestError. `warning`,
    for a model that has another format, is logged when the format is first used. `image_id` marks
    an image; None: the model reads no images. `tool_format` is the default form of tools and calls;
    `tools_warning` is logged when tools are first offered.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        warning: str | None = None,
        image_id: int | None = None,
        tool_format: ToolFormat = "json",
        tools_warning: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_id = image_id
        self.tool_format = tool_format
        self._warnings = {"format": warning, "tools": tools_warning}  # not logged yet

    def warn_once(self, of: Literal["format", "tools"] = "format") -> None:
        """Log this warning if there is one that has not been logged."""
        if warning := self._warnings.pop(of, None):
            logger.warning("%s", warning)

    def encode_header(self, message: Message | str) -> list[int]:
        """`<|start_header_id|>role<|end_header_id|>\\n\\n` for a message or a role name."""
        role = message if isinstance(message, str) else _get(message, "role")
        if role not in WRITTEN_ROLE:
            raise RequestError(f"unknown role {role!r}: a message's role is one of {', '.join(WRITTEN_ROLE)}")
        vocabulary = self.tokenizer.vocabulary
        return [
            vocabulary.special_id("<|start_header_id|>"),
            *self._encode_text(WRITTEN_ROLE[role]),
            vocabulary.special_id("<|end_header_id|>"),
            *self._encode_text("\n\n"),
        ]

    def offered(self, tools: "ToolSet | Iterable[ToolLike] | None", tool_format: str | None = None) -> ToolSet | None:
        """Tools as a ToolSet, in this model's form unless another is given; None without tools.

        Raises RequestError for tools that cannot be offered.
        """
        chosen = ToolSet.from_tools(tools or (), tool_format)
        if not chosen.names:
            return None
        self.warn_once("tools")
        return replace(chosen, format=chosen.format or self.tool_format)

    def encode_message(self, message: Message, tool_format: ToolFormat | None = None) -> list[int]:
        """Header, content, tool calls and end token; an unedited answer keeps its generated ids."""
        ids = self.encode_header(_get(message, "role"))
        calls = _tool_calls(message)
        end = self.tokenizer.eom_id if _waits_for_tool(message) else self.tokenizer.eot_id
        if self._is_as_generated(message):
            own = message["token_ids"]
            return [*ids, *own] if own[-1:] and own[-1] in self.tokenizer.stop_tokens else [*ids, *own, end]
        if calls and calls[0]["tool_name"] == CODE:
            ids.append(self.tokenizer.python_tag_id)
        for item in content_items(message):
            ids += self._encode_text(item["text"]) if item["type"] == "text" else [self._image_id(message)]
        for text in _written(calls, tool_format or self.tool_format):
            ids += self._encode_text(text)
        return [*ids, end]

    def encode_dialog_prompt(self, dialog: Sequence[Message], tools: ToolSet | Iterable[ToolLike] | None = None) -> list[int]:
        """begin_of_text, the messages, and an assistant header for the model to continue.

        `tools` are written into the dialog first: `ToolSet.from_tools(tools).write(dialog)` shows how.
        """
        if isinstance(dialog, str | Mapping) or not isinstance(dialog, Sequence) or not dialog:
            raise RequestError(f"a dialog is a list of at least one message, got {_shown(dialog)}")
        self.warn_once()
        return self.encode_messages(dialog, tools) + self.encode_header("assistant")

    def encode_messages(self, dialog: Sequence[Message], tools: ToolSet | Iterable[ToolLike] | None = None) -> list[int]:
        """begin_of_text and the messages, of which there may be none."""
        offered = ToolSet.from_tools(tools or ())
        tool_format = offered.format or self.tool_format
        written = cast(Dialog, offered.write(dialog, tool_format))
        ids = [self.tokenizer.bos_id]
        for i, message in enumerate(written, start=len(dialog) - len(written)):
            try:
                ids += self.encode_message(message, tool_format)
            except RequestError as error:
                raise RequestError(f"message {i} of the dialog (counted from 0): {error}") from error
        return ids

    def decode_assistant_message(
        self,
        ids: Sequence[int],
        stop_reason: StopReason | None = None,
        tools: ToolSet | Iterable[ToolLike] | None = None,
    ) -> Message:
        """Decode generated ids, which follow the assistant header, into a message.

        Tool calls are recognised in every form (`parse_tool_calls`); content is the text around
        them. A stop token at the end determines the stop reason, else `stop_reason` does. Given the
        offered `tools`, calls of other tools are marked, and the message keeps the ids as
        `token_ids`.
        """
        ids = list(ids)
        ends: dict[int, StopReason] = dict.fromkeys(self.tokenizer.stop_tokens, "end_of_turn")
        ends[self.tokenizer.eom_id] = "end_of_message"
        if ids and ids[-1] in ends:
            stop_reason = ends[ids[-1]]
        answer = parse_tool_calls(ids, tools, tokenizer=self.tokenizer)
        message = Message(role="assistant", content=answer.text)
        if answer.calls:
            message["tool_calls"] = [_tool_call(call) for call in answer.calls]
        if stop_reason:
            message["stop_reason"] = stop_reason
        if tools:
            message["token_ids"] = ids
        return message

    def _is_as_generated(self, message: Message) -> bool:
        """Whether an answer has its ids and they still match it: it may have been edited."""
        ids = message.get("token_ids")
        if ids is None or message["role"] != "assistant":
            return False
        if not isinstance(ids, list) or not all(type(each) is int for each in ids):
            raise RequestError(f"token_ids is a list of token ids, got {_shown(ids)}")
        answer = parse_tool_calls(ids, tokenizer=self.tokenizer)
        said = [(call["tool_name"], call["arguments"]) for call in _tool_calls(message)]
        return answer.text == message.get("content") and [(call.name, call.arguments) for call in answer.calls] == said

    def _image_id(self, message: Message) -> int:
        if self.image_id is None:
            raise RequestError(NO_IMAGES)
        if message["role"] != "user":
            raise RequestError(f"only a user's message has images, this one's role is {message['role']!r}")
        return self.image_id

    def _encode_text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=False, eos=False)


def content_items(message: Message) -> list[ContentItem]:
    """A message's content as items. Raises RequestError for malformed ones."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list | tuple) or not content:
        return [TextItem(type="text", text=_get(message, "content"))]
    for given in content:
        item: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
        kind = item.get("type")
        if kind not in ("text", "image"):
            raise RequestError(
                f'content is a text, or a list of items like {{"type": "text", "text": "…"}} and {{"type": "image", "image": '
                f'"photo.jpg"}}, got {_shown(given)}'
            )
        if kind not in item or (kind == "text" and not isinstance(item["text"], str)):
            raise RequestError(f"an item of type {kind!r} needs its {kind!r}, got {_shown(given)}")
    return list(content)


def images_in(dialog: Sequence[Message]) -> "list[ImageSource]":
    """The images of a dialog's messages, in order."""
    return [item["image"] for message in dialog for item in content_items(message) if item["type"] == "image"]


def tool_call_text(call: ToolCall, tool_format: ToolFormat = "json") -> str:
    """A tool call as the model writes it. Raises RequestError if it cannot be written."""
    return calls_text([(call["tool_name"], call["arguments"])], tool_format)


def parse_tool_call(text: str) -> ToolCall | None:
    """The tool call that makes up all of `text`; None for anything else, or for several calls."""
    answer = parse_tool_calls(text)
    return _tool_call(answer.calls[0]) if len(answer.calls) == 1 and not answer.text else None


def _tool_call(call: Call) -> ToolCall:
    found = ToolCall(tool_name=call.name, arguments=call.arguments)
    if not call.is_offered:
        found["is_offered"] = False
    return found


def _written(calls: Sequence[ToolCall], tool_format: ToolFormat) -> list[str]:
    """The texts of calls, encoded one by one as Meta does; a Python list is one text.

    A model may call a tool that its form cannot express, such as a name with a space: it is written
    as JSON.
    """
    given = [(call["tool_name"], call["arguments"]) for call in calls]
    texts = [given] if tool_format == "python_list" and given else [[call] for call in given]
    try:
        return [calls_text(some, tool_format) for some in texts]
    except RequestError:
        return [calls_text([call], "json") for call in given]


def _get(message: Mapping[str, Any], key: str) -> str:
    if not isinstance(message, Mapping):
        raise RequestError(f'a message is a dict like {{"role": "user", "content": "…"}}, got {_shown(message)}')
    if not isinstance(message.get(key), str):
        found = f"it is {_shown(message[key])}" if key in message else f"it has only {sorted(map(str, message))}"
        raise RequestError(f"a message needs a string as its {key!r}; {found}")
    return message[key]


def _tool_calls(message: Message) -> list[ToolCall]:
    calls = message.get("tool_calls") or []
    if isinstance(calls, str) or not isinstance(calls, Sequence):
        raise RequestError(f"tool_calls is a list of calls, got {_shown(calls)}")
    if calls and message["role"] != "assistant":
        raise RequestError(f"only an assistant's message has tool_calls, this one's role is {message['role']!r}")
    for call in calls:
        if not isinstance(call, Mapping) or not isinstance(call.get("tool_name"), str) or "arguments" not in call:
            raise RequestError(f'a tool call is a dict like {{"tool_name": "…", "arguments": {{…}}}}, got {_shown(call)}')
    return calls


def _waits_for_tool(message: Message) -> bool:
    stop_reason = message.get("stop_reason")
    if stop_reason is not None and stop_reason not in STOP_REASONS:
        raise RequestError(f"unknown stop_reason {stop_reason!r}: it is one of {', '.join(STOP_REASONS)}")
    return message["role"] == "assistant" and stop_reason == "end_of_message"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
