"""Cut a text into windows for perplexity: tokens read together, and which of them are scored.

A model's context is limited, so a long text is cut into windows. Each convention cuts in its own
way, so their figures are not comparable.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from llama_ref.errors import RequestError

Convention = Literal["hf", "llama.cpp"]

DEFAULT_CONTEXT: dict[Convention, int] = {"hf": 2048, "llama.cpp": 512}  # llama.cpp's own default
DEFAULT_STRIDE = 512  # from the guide that "hf" follows
SHORTEST_CONTEXT, SHORTEST_STRIDE = 4, 2


@dataclass(frozen=True)
class Window:
    """Tokens read together; those from `begin` (1 or more) on are scored, given all before them.

    `weight` is the weight of this window's mean in the mean over all windows.
    """

    ids: Sequence[int]
    begin: int
    weight: int

    @property
    def scored(self) -> Sequence[int]:
        return self.ids[self.begin :]


@dataclass(frozen=True)
class Cut:
    """How a text is cut: windows of `context` tokens that start every `stride` tokens."""

    convention: Convention
    context: int
    stride: int

    @classmethod
    def parse(cls, convention: Convention, context: int | None, stride: int | None, longest: int) -> "Cut":
        """Fill in a convention's defaults. Raises RequestError for invalid numbers.

        `longest`: the model's context.
        """
        context = min(DEFAULT_CONTEXT[convention], longest) if context is None else context
        if not SHORTEST_CONTEXT <= context <= longest:
            raise RequestError(
                f"context is {context:,}, expected {SHORTEST_CONTEXT} to {longest:,}, the model's longest context"
            )
        if convention == "llama.cpp":
            if stride not in (None, context):
                raise RequestError(f"stride is {stride:,}: windows of the llama.cpp convention do not overlap; leave it out")
            return cls(convention, context, context)
        stride = min(DEFAULT_STRIDE, context) if stride is None else stride
        if not SHORTEST_STRIDE <= stride <= context:
            raise RequestError(
                f"stride is {stride:,}, expected {SHORTEST_STRIDE} to {context:,}, the context: a longer one would skip tokens"
            )
        return cls(convention, context, stride)

    def windows(self, ids: Sequence[int], bos: int) -> list[Window]:
        """The windows of a text's ids, which begin with `bos`.

        Raises RequestError for too few ids.
        """
        if self.convention == "llama.cpp":
            return list(_halves(ids, self.context, bos))
        if len(ids) < 2:
            raise RequestError("there is nothing to score: the text has no tokens")
        return list(_strides(ids, self.context, self.stride))


def _strides(ids: Sequence[int], context: int, stride: int) -> Iterator[Window]:
    """Windows as in Hugging Face's guide: each scores the tokens that earlier ones have not scored.

    The guide weights a window's mean by its number of new tokens minus one. For the first window
    that is right, as nothing predicts its first token; for an overlapping window it is one too few.
    """
    end = 0
    for begin in range(0, len(ids), stride):
        before, end = end, min(begin + context, len(ids))
        if end - begin > 1:
            yield Window(ids[begin:end], max(1, before - begin), end - before - 1)
        if end == len(ids):
            return


def _halves(ids: Sequence[int], context: int, bos: int) -> Iterator[Window]:
    """Windows as in llama.cpp's tool: disjoint, second halves scored, an incomplete one dropped."""
    if len(ids) < 2 * context:
        raise RequestError(
            f"the text has {len(ids):,} tokens, but llama.cpp's convention needs {2 * context:,}, two windows: give a longer "
            "text or a smaller --context"
        )
    for start in range(0, len(ids) - context + 1, context):
        begin = context // 2 + 1
        yield Window([bos, *ids[start + 1 : start + context]], begin, context - begin)
