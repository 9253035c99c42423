"""The conversation that a guard judges, as texts that cannot imitate other parts of the prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama_ref.chat import Message, content_items
from llama_ref.errors import RequestError
from llama_ref.guard.defusing import as_text

if TYPE_CHECKING:
    from llama_ref.images import ImageSource

EXPECTED = "expected alternating messages of user and assistant, the user's first"


@dataclass(frozen=True)
class Conversation:
    """Alternating texts, the user's first; the last one is judged.

    `image`: the last image in the dialog.
    """

    turns: tuple[str, ...]
    image: "ImageSource | None" = None

    @property
    def judged(self) -> str:
        """The author of the last turn, as the prompt calls it."""
        return role(len(self.turns) - 1)


def role(turn: int) -> str:
    """The author of a turn, counted from 0, as the prompt calls it."""
    return "Agent" if turn % 2 else "User"


def read_conversation(dialog: Sequence[Message]) -> Conversation:
    """Read a dialog's texts.

    Raises RequestError unless user and assistant alternate and the last message has text.
    """
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


def _check_role(message: Message, number: int) -> None:
    """Raise RequestError unless this message has the role that is expected at its place."""
    found = message.get("role") if isinstance(message, Mapping) else None
    if found in ("tool", "ipython") or (isinstance(message, Mapping) and message.get("tool_calls")):
        raise RequestError(
            "Llama Guard's prompt has no format for tool calls and results: leave them out, or give them as an assistant's text"
        )
    if found == "system":
        raise RequestError("Llama Guard does not judge system prompts: leave it out")
    expected = "assistant" if number % 2 else "user"
    if found != expected:
        raise RequestError(f"its role is {found!r:.60}, not {expected!r}: {EXPECTED}")
