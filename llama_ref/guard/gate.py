"""A session with a guard: unsafe messages are not answered or shown, and are removed."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from llama_ref.chat import ContentItem, Dialog, ImageItem, Message, TextItem
from llama_ref.guard.judge import Guard
from llama_ref.guard.verdict import Verdict

if TYPE_CHECKING:
    from llama_ref.images import ImageSource
    from llama_ref.session import Session


class Gate:
    """Judges a session's questions before they are asked, and its answers before they are shown.

    The guard sees the whole conversation except system prompts.
    """

    def __init__(self, guard: Guard, session: "Session") -> None:
        self.guard, self.session = guard, session

    def question(self, text: str, images: Sequence["ImageSource"] = ()) -> Verdict:
        """The verdict on the user's next message; does not change the session."""
        items: list[ContentItem] = [ImageItem(type="image", image=image) for image in images]
        message = Message(role="user", content=[*items, TextItem(type="text", text=text)])
        return self.guard.judge([*self._dialog(), message])

    def answer(self, pieces: Iterable[str]) -> Verdict | None:
        """Consume the pieces of an answer from `Session.say` and judge it.

        None for an empty answer.
        The turn is withdrawn if the answer is not safe, is interrupted or cannot be judged.
        """
        verdict, is_kept = None, False
        try:
            text = "".join(pieces)
            if text.strip():
                verdict = self.guard.judge(self._dialog())
            is_kept = verdict is None or verdict.is_safe
        finally:
            if not is_kept:
                self.session.withdraw()
        return verdict

    def _dialog(self) -> Dialog:
        return [message for message in self.session.dialog if message["role"] != "system"]
