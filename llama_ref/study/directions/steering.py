"""Steer a model: add a direction to its residual stream, or remove it, and score the effect.

with study.steer(llama.model, direction, scale=4, layers=[10, 11]):
    llama.generate(…)
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real

import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.numbers import plain_number
from llama_ref.parallel.division import whole_args
from llama_ref.study.directions.extraction import check_direction
from llama_ref.study.inputs import check_index, one_each
from llama_ref.study.passes.hooks import check_part, read_logits
from llama_ref.study.passes.pass_size import split_passes
from llama_ref.study.patch import Edit, edit, patch
from llama_ref.study.texts import Batch, Text, as_texts

WRITES = ("attention.output", "ffn.output")  # what a layer adds to the residual stream


@contextmanager
def steer(
    model: Transformer,
    direction: Tensor | Mapping[int, Tensor],
    scale: float = 1.0,
    layers: int | Sequence[int] | None = None,
) -> Iterator[None]:
    """Add `scale` times a direction to the residual stream after layers, at every token, in the block.

    `direction` is (D,), for all of `layers`, or one per layer, {layer: (D,)}, of which `layers` may
    select some. Like `patch`, it applies in this thread, in generation too. Raises RequestError.
    """
    check_part(model)
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise RequestError(f"scale is {scale!r:.40}, expected a finite number")
    each = _by_layer(model, direction, layers)
    with patch(model, {f"layers.{layer}.residual_post": _adding(own * float(scale)) for layer, own in each.items()}):
        yield


@contextmanager
def ablate(model: Transformer, direction: Tensor) -> Iterator[None]:
    """Remove a direction (D,) from everything that is written to the residual stream, in the block.

    Embedding, attention and feed-forward of every layer write nothing along it, as if their weights
    were orthogonal to it. Raises RequestError.
    """
    check_part(model)
    removing = _removing(check_direction(direction, whole_args(model).dim))
    kinds = ["layers", *(["cross_layers"] if whole_args(model).cross_layers else [])]
    names = ["embedding", *(f"{kind}.*.{write}" for kind in kinds for write in WRITES)]
    with patch(model, dict.fromkeys(names, removing)):
        yield


def _adding(vector: Tensor) -> Edit:
    return edit(lambda value: value + vector.to(value))


def _removing(direction: Tensor) -> Edit:
    unit = direction / direction.norm()

    def remove(value: Tensor) -> Tensor:
        along = unit.to(value.device)
        wide = value.float()
        return (wide - (wide @ along)[..., None] * along).to(value.dtype)

    return edit(remove)


def _by_layer(
    model: Transformer, direction: Tensor | Mapping[int, Tensor], layers: int | Sequence[int] | None
) -> dict[int, Tensor]:
    """The direction of every layer that gets one. Raises RequestError."""
    if layers is None and not isinstance(direction, Mapping):
        raise RequestError("layers is missing: after which layers should the direction be added?")
    given = plain_number(layers)
    wanted = list(direction) if given is None else [given] if isinstance(given, int) else given
    if isinstance(wanted, str) or not isinstance(wanted, Sequence) or not wanted:
        raise RequestError(f"layers is {layers!r:.60}, expected a layer or a list of them")
    found = {}
    for each in wanted:
        layer = check_index("layer", each, whole_args(model).n_layers)
        if isinstance(direction, Mapping) and layer not in direction:
            raise RequestError(f"there is no direction for layer {layer}, only for {', '.join(map(str, sorted(direction)))}")
        found[layer] = check_direction(direction[layer] if isinstance(direction, Mapping) else direction, whole_args(model).dim)
    return found


# ---- scores


@torch.no_grad()
def log_likelihoods(model: Transformer, prompts: Sequence[Text], answers: Text | Sequence[Text]) -> Tensor:
    """The log-probability of an answer after each prompt, in nats: float32 (n,), on the CPU.

    Both are ids; `answers` has one for each prompt, or one for all. Call it with and without `steer` or
    another patch to measure the effect. Raises RequestError.
    """
    check_part(model)
    before = as_texts(model, prompts)
    given = as_texts(model, answers)
    after = one_each("answers", given if len(given) > 1 else given[0], len(before))
    texts = [torch.cat(pair) for pair in zip(before, after, strict=True)]
    found = torch.zeros(len(texts), device="cpu")
    for some in split_passes(list(map(len, texts))):
        hidden = Batch.from_texts(model, texts[some.start : some.stop]).hidden(model)
        for row, i in enumerate(some):
            n, end = len(after[i]), len(texts[i])
            logprobs = read_logits(model, hidden[row, end - n - 1 : end - 1]).log_softmax(-1)  # (n, V)
            found[i] = logprobs.gather(-1, after[i][:, None].to(logprobs.device)).sum().cpu()
    return found


def answer_margins(model: Transformer, prompts: Sequence[Text], answer: Text, other: Text) -> Tensor:
    """By how many nats one answer is likelier than another after each prompt: (n,)."""
    return log_likelihoods(model, prompts, answer) - log_likelihoods(model, prompts, other)


def share_of_tokens(texts: Sequence[Sequence[int]], wanted: Callable[[int], bool] | set[int]) -> float:
    """The share of generated tokens that are wanted; `wanted` is a set of ids, or a function of an id."""
    test = wanted.__contains__ if isinstance(wanted, set) else wanted
    tokens = [token for text in texts for token in text]
    if not tokens:
        raise RequestError("texts have no tokens, expected ids that were generated")
    return sum(map(test, tokens)) / len(tokens)
