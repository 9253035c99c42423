"""Llama 3's chat format: each message has a header, text, tool calls and an end token."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from llama_ref.errors import RequestError
from llama_ref.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama_ref.images import ImageSource

logger = logging.getLogger(__name__)

Role = Literal["system", "user", "assistant", "tool", "ipython"]
StopReason = Literal["end_of_turn", "end_of_message", "out_of_tokens"]

WRITTEN_ROLE = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython", "ipython": "ipython"}
NO_IMAGES = "this model reads no images; use a vision release, such as Llama3.2-11B-Vision-Instruct"
STOP_REASONS = ("end_of_turn", "end_of_message", "out_of_tokens")
BUILTIN_ARGUMENT = {"brave_search": "query", "wolfram_alpha": "query", "photogen": "query", "code_interpreter": "code"}
BUILTIN_CALL = re.compile(r'(brave_search|wolfram_alpha|photogen)\.call\(query="([^"]*)"\)')


class ToolCall(TypedDict):
    """A tool call. Built-in tools take {"query": str}, code_interpreter takes {"code": str}."""

    tool_name: str
    arguments: dict[str, Any] | str


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

    The stop_reason end_of_message means that the assistant waits for a tool's result.
    """

    tool_calls: list[ToolCall]
    stop_reason: StopReason | None


Dialog = list[Message]


class ChatFormat:
    """Encodes dialogs as token ids and decodes generated ids into messages.

    Text never becomes a special token, and nothing is stripped. Malformed dialogs (empty, an
    unknown role, content that is missing or neither text nor items) raise RequestError. `warning`, of
    a model that has another format, is logged when the format is first used. `image_id` stands for an
    image; None: the model reads none.
    """

    def __init__(self, tokenizer: Tokenizer, warning: str | None = None, image_id: int | None = None) -> None:
        self.tokenizer = tokenizer
        self._warning = warning
        self.image_id = image_id

    def warn_once(self) -> None:
        """Log the warning, if there is one and it was not logged before."""
        if self._warning:
            logger.warning("%s", self._warning)
            self._warning = None

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

    def encode_message(self, message: Message) -> list[int]:
        """Header, content, tool calls (in Meta's JSON tool prompt format) and end token."""
        ids = self.encode_header(_get(message, "role"))
        calls = _tool_calls(message)
        if calls and calls[0]["tool_name"] == "code_interpreter":
            ids.append(self.tokenizer.python_tag_id)
        for item in content_items(message):
            ids += self._encode_text(item["text"]) if item["type"] == "text" else [self._image_id(message)]
        for call in calls:
            ids += self._encode_text(tool_call_text(call))
        ids.append(self.tokenizer.eom_id if _waits_for_tool(message) else self.tokenizer.eot_id)
        return ids

    def encode_dialog_prompt(self, dialog: Sequence[Message]) -> list[int]:
        """begin_of_text, the messages, and an assistant header for the model to continue."""
        if isinstance(dialog, str | Mapping) or not isinstance(dialog, Sequence) or not dialog:
            raise RequestError(f"a dialog is a list of at least one message, got {_shown(dialog)}")
        self.warn_once()
        ids = [self.tokenizer.bos_id]
        for i, message in enumerate(dialog):
            try:
                ids += self.encode_message(message)
            except RequestError as error:
                raise RequestError(f"message {i} of the dialog (counted from 0): {error}") from error
        return ids + self.encode_header("assistant")

    def decode_assistant_message(self, ids: Sequence[int], stop_reason: StopReason | None = None) -> Message:
        """The message in generated ids, which follow the assistant header.

        A tool call is recognised if it is the whole text: a built-in tool's `name.call(query="…")`,
        a JSON object with name and parameters, or any text after `<|python_tag|>`, which is code to
        run. Content is then "". A stop token at the end determines the stop reason, else
        `stop_reason` does.
        """
        ids = list(ids)
        ends: dict[int, StopReason] = dict.fromkeys(self.tokenizer.stop_tokens, "end_of_turn")
        ends[self.tokenizer.eom_id] = "end_of_message"
        if ids and ids[-1] in ends:
            stop_reason = ends[ids.pop()]
        after_python_tag = ids[:1] == [self.tokenizer.python_tag_id]
        text = self.tokenizer.decode(ids[after_python_tag:])

        call = parse_tool_call(text)
        if call is None and after_python_tag:
            call = ToolCall(tool_name="code_interpreter", arguments={"code": text})
        message = Message(role="assistant", content="" if call else text)
        if call:
            message["tool_calls"] = [call]
        if stop_reason:
            message["stop_reason"] = stop_reason
        return message

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


def tool_call_text(call: ToolCall) -> str:
    """A tool call as the model writes it. Raises RequestError if the argument is missing."""
    name, arguments = call["tool_name"], call["arguments"]
    key = BUILTIN_ARGUMENT.get(name)
    if key is None:
        try:
            return json.dumps({"type": "function", "name": name, "parameters": arguments})
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the arguments of the call of {name!r} cannot be written as JSON: {error}") from error
    value = arguments.get(key) if isinstance(arguments, Mapping) else None
    if not isinstance(value, str):
        raise RequestError(f'a call of {name} has the arguments {{"{key}": "…"}}, got {_shown(arguments)}')
    return value if name == "code_interpreter" else f'{name}.call(query="{value}")'


def parse_tool_call(text: str) -> ToolCall | None:
    """The tool call in `text`, in the built-in or the JSON form; None if it is not a tool call."""
    text = text.strip()
    if builtin := BUILTIN_CALL.fullmatch(text):
        return ToolCall(tool_name=builtin[1], arguments={"query": builtin[2]})
    if not text.startswith("{"):
        return None
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    name, arguments = call.get("name"), call.get("parameters")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    if name in BUILTIN_ARGUMENT:  # whatever the model calls the argument; Meta also takes the first
        value = next(iter(arguments.values()), None)
        if not isinstance(value, str):
            return None
        arguments = {BUILTIN_ARGUMENT[name]: value}
    return ToolCall(tool_name=name, arguments=arguments)


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
