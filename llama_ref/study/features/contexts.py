"""Find where in a data set a feature fires most: its strongest tokens, and the tokens around them."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.study.datasets.collected import Collected
from llama_ref.study.features.dictionary import BLOCK_TOKENS, Features
from llama_ref.study.features.edits import chosen_features
from llama_ref.study.inputs import check_count
from llama_ref.study.texts import Texts, as_texts
from llama_ref.study.trace import trace_each


@dataclass(frozen=True)
class Context:
    """The token of a text at which a feature is strongest, and a window around it.

    `text` is the text's number, `position` the token's position in it. `tokens` are the window's ids,
    `values` the feature's value at each, and `at` the token's index in the window.
    """

    value: float
    text: int
    position: int
    tokens: list[int]
    values: list[float]
    at: int


@torch.no_grad()
def top_contexts(
    features: Features,
    chosen: int | Sequence[int],
    texts: Texts | Collected,
    *,
    model: Transformer | None = None,
    n: int = 10,
    before: int = 12,
    after: int = 4,
    progress: Progress | None = None,
) -> dict[int, list[Context]]:
    """The n texts in which each chosen feature fires most, the strongest first: {feature: contexts}.

    `texts` are ids, which `model` runs, or activations that `collect` stored, which need no model. They are
    read once, as many at a time as one pass takes, and only the best are kept. A window has `before`
    and `after` tokens around the strongest of its text; with collected texts, only tokens that were kept.
    Texts in which a feature does not fire are left out. `progress` is called with (texts done, all).
    Raises RequestError for features that do not exist or belong to another model, or an activation that
    was not collected.
    """
    numbers = chosen_features(features, chosen)
    n, before, after = check_count("n", n, 1), check_count("before", before), check_count("after", after)
    best: list[list[tuple[float, int, Context]]] = [[] for _ in numbers]
    n_texts, blocks = _collected(features, texts) if isinstance(texts, Collected) else _run(features, texts, model)
    counter = ProgressCounter(n_texts, progress)
    for block in blocks:
        values = features.encode_some(torch.cat([own.activation for own in block]), numbers).cpu()
        for own, part in zip(block, values.split([len(own.tokens) for own in block]), strict=True):
            for heap, column in zip(best, part.T, strict=True):
                _keep(heap, own, column, n, before, after)
        counter.advance(len(block))
    return {number: [each[2] for each in sorted(heap, reverse=True)] for number, heap in zip(numbers, best, strict=True)}


@dataclass(frozen=True)
class _Text:
    number: int
    tokens: Tensor  # (t,)
    positions: Sequence[int]
    activation: Tensor  # (t, D)


def _keep(heap: list[tuple[float, int, Context]], own: _Text, values: Tensor, n: int, before: int, after: int) -> None:
    """Keep a text's strongest token, if it is among the n best so far."""
    strongest, column = values.max(0)
    value, at = float(strongest), int(column)
    if value <= 0 or (len(heap) == n and value <= heap[0][0]):
        return
    window = slice(max(0, at - before), at + after + 1)
    context = Context(
        value,
        own.number,
        own.positions[at],
        own.tokens[window].tolist(),
        values[window].tolist(),
        at - window.start,
    )
    (heapq.heappush if len(heap) < n else heapq.heapreplace)(heap, (value, -own.number, context))


def _run(features: Features, texts: Texts, model: Transformer | None) -> tuple[int, Iterator[list[_Text]]]:
    if model is None:
        raise RequestError("model is missing: texts given as ids need a model to run them")
    features.check(model)
    ids = as_texts(model, texts)

    def each() -> Iterator[_Text]:
        for i, seen in enumerate(trace_each(model, ids, features.reads)):
            yield _Text(i, seen.tokens[0].cpu(), range(len(ids[i])), seen[features.reads][0])

    return len(ids), _blocks(each())


def _collected(features: Features, texts: Collected) -> tuple[int, Iterator[list[_Text]]]:
    shape = texts.select(features.reads, prompts=[0])[:1].shape
    if shape[1:] != (features.dim,):
        raise RequestError(f"{features.reads} was collected as {tuple(shape[1:])}, but {features.path} reads ({features.dim},)")
    each = (_Text(i, texts.tokens(i), texts.positions(i), texts.select(features.reads, prompts=[i])) for i in range(len(texts)))
    return len(texts), _blocks(each)


def _blocks(texts: Iterator[_Text]) -> Iterator[list[_Text]]:
    """Group texts into blocks of about BLOCK_TOKENS tokens."""
    block: list[_Text] = []
    for own in texts:
        block.append(own)
        if sum(len(each.tokens) for each in block) >= BLOCK_TOKENS:
            yield block
            block = []
    if block:
        yield block
