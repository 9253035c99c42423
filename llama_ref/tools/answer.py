"""The parsed form of a model's answer: tool calls, and the text around them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """One tool call. `is_offered` is False if no offered tool has this name."""

    name: str
    arguments: dict[str, Any]
    is_offered: bool = True


@dataclass(frozen=True)
class Answer:
    """The calls in an answer, in order, and the remaining text.

    `text` is the text before, between and after the calls; the whole answer if there are none.
    `problems` says why parts of the text that look like calls are not.
    """

    calls: tuple[Call, ...]
    text: str
    problems: tuple[str, ...] = ()
