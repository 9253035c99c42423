"""The conversation that a guard judges: turns as texts, which cannot pass for other parts of the prompt."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama_ref.chat import Message, content_items
from llama_ref.errors import RequestError

if TYPE_CHECKING:
    from llama_ref.images import ImageSource

EXPECTED = "expected messages of user and assistant in turn, the user's first"
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
MARKERS = re.compile(
    r"<(\s*(?:/\s*)?(?:BEGIN|END)\s+(?:UNSAFE\s+CONTENT\s+CATEGORIES|CONVERSATION)\s*)>|\[(\s*(?:/\s*)?INST\s*)\]",
    re.IGNORECASE,
)
FORGED_TURN = re.compile(rf"(?<=[{LINE_ENDS}])(?=[^\S{LINE_ENDS}]*(?:user|agent|assistant)\s*:)", re.IGNORECASE)


@dataclass(frozen=True)
class Conversation:
    """Texts in turn, the user's first; the last is the one to judge. `image`: the last one shown."""

    turns: tuple[str, ...]
    image: "ImageSource | None" = None

    @property
    def judged(self) -> str:
        """Who wrote the last turn, in the prompt's words."""
        return role(len(self.turns) - 1)


def role(turn: int) -> str:
    """Who writes a turn, counted from 0, in the prompt's words."""
    return "Agent" if turn % 2 else "User"


def read_conversation(dialog: Sequence[Message]) -> Conversation:
    """A dialog's texts. Raises RequestError unless user and assistant alternate and the last one said something."""
    if isinstance(dialog, str | Mapping) or not isinstance(dialog, Sequence) or not dialog:
        raise RequestError(f"the conversation is {dialog!r:.60}, {EXPECTED}")
    turns, image = [], None
    for i, message in enumerate(dialog):
        try:
            _check_role(message, i)
            items = content_items(message)
        except RequestError as error:
            raise RequestError(f"message {i} of the dialog (counted from 0): {error}") from error
        texts = [item["text"] for item in items if item["type"] == "text"]
        turns.append(as_text("\n".join(texts)))
        image = next((item["image"] for item in reversed(items) if item["type"] == "image"), image)
    if not turns[-1]:
        raise RequestError("the last message has no text: there is nothing to judge")
    return Conversation(tuple(turns), image)


def as_text(text: str) -> str:
    """A text, stripped, in which nothing reads as the end of the conversation or as another turn.

    `<END CONVERSATION>` becomes `(END CONVERSATION)`, and so do its relatives and Guard 2's `[/INST]`; a
    line that begins with `User:`, `Agent:` or `Assistant:` is quoted with `> `. The words stay: they are
    judged too.
    """
    unmarked = MARKERS.sub(lambda match: f"({match[1] or match[2]})", text.strip())
    return FORGED_TURN.sub("> ", unmarked)


def _check_role(message: Message, number: int) -> None:
    """Raise RequestError unless this message is whose turn it is."""
    found = message.get("role") if isinstance(message, Mapping) else None
    if found in ("tool", "ipython") or (isinstance(message, Mapping) and message.get("tool_calls")):
        raise RequestError(
            "Llama Guard has no form for tool calls and their results: leave them out, or give them as an assistant's text"
        )
    if found == "system":
        raise RequestError("Llama Guard judges no system prompts: leave it out")
    expected = "assistant" if number % 2 else "user"
    if found != expected:
        raise RequestError(f"its role is {found!r:.60}, not {expected!r}: {EXPECTED}")
