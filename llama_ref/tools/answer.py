"""What a model's answer holds: tool calls, and the text around them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """One tool call. `is_offered` is False for a name that is not among the tools that were offered."""

    name: str
    arguments: dict[str, Any]
    is_offered: bool = True


@dataclass(frozen=True)
class Answer:
    """The calls in an answer, in order, and the rest of it.

    `text` is what stands before, between and after the calls; the whole answer if it has none.
    `problems` says why parts of the text that look like calls are not.
    """

    calls: tuple[Call, ...]
    text: str
    problems: tuple[str, ...] = ()
