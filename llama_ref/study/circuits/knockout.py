"""Attention knockout: prevent some tokens from attending to others, in chosen layers and heads.

with study.cut(llama.model, queries=-1, keys=[3, 4], layers=range(10, 20)):
    llama.generate(…)

The layers where this loses the answer are those where a token reads what it needs. Source: Geva et al.,
arXiv:2304.14767.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.numbers import is_whole
from llama_ref.parallel.division import whole_args
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.study.inputs import check_index, one_each
from llama_ref.study.passes.hooks import Pass, attached, check_part
from llama_ref.study.passes.pass_size import tokens_that_fit
from llama_ref.study.patch import Indices, check_indices
from llama_ref.study.patching.metrics import Metric, measure
from llama_ref.study.patching.streams import Streams
from llama_ref.study.texts import Texts, as_texts


@contextmanager
def cut(
    model: Transformer,
    *,
    queries: Indices | None = None,
    keys: Indices | None = None,
    layers: Indices | None = None,
    heads: Indices | None = None,
) -> Iterator[None]:
    """Prevent the tokens `queries` from attending to the tokens `keys`, in the block, in this thread.

    Their scores become −∞ before the softmax, in these layers and query heads; None means all. Positions
    count from the beginning of the text, also with a cache; -1 is the last token of each text in the pass.
    A token with no keys left gets 0 from that head. Raises RequestError for a layer or head that the model
    does not have, and, during a pass without a cache, for a position outside the text.
    """
    check_part(model)
    own_queries = None if queries is None else [check_indices("queries", queries)]
    own_keys = None if keys is None else [check_indices("keys", keys)]
    chosen = _numbers("layer", layers, whole_args(model).n_layers)
    with attached(model, _Cut(own_queries, own_keys, chosen, _head_mask(model, heads))):
        yield


@dataclass(frozen=True)
class CutWindows:
    """The metric of each text with attention cut in a window of layers: `values`, float32 (n_layers, texts).

    `windows` are the layers of each row, `whole` (texts,) is the metric without a cut. On the CPU.
    """

    windows: list[range]
    values: Tensor
    whole: Tensor

    @property
    def relative(self) -> Tensor:
        """Mean relative change over the texts: (n_layers,); -1 if the metric falls to 0."""
        return (self.values / self.whole - 1).mean(1)

    @property
    def standard_error(self) -> Tensor:
        """Standard error of `relative`: (n_layers,); NaN for one text."""
        return (self.values / self.whole - 1).std(1) / math.sqrt(len(self.whole))


@torch.no_grad()
def cut_windows(
    model: Transformer,
    texts: Texts,
    metrics: Metric | Sequence[Metric],
    *,
    queries: Indices | Sequence[Sequence[int]],
    keys: Indices | Sequence[Sequence[int]],
    heads: Indices | None = None,
    width: int = 1,
    progress: Progress | None = None,
) -> CutWindows:
    """Cut attention in a window of `width` layers around each layer, and measure the texts.

    Windows are shorter at the first and last layers. Positions as in `cut`, for all texts or a list for
    each; metrics as in `patch_grids`. Each run starts at the first layer of its window. `progress` is called
    with the windows done and their number. Raises RequestError.
    """
    check_part(model)
    if not is_whole(width) or width < 1:
        raise RequestError(f"width is {width!r:.40}, expected a number of layers from 1")
    width, ids, n_layers = int(width), as_texts(model, texts), whole_args(model).n_layers
    measured = one_each("metrics", metrics, len(ids))
    own_queries, own_keys = _for_each("queries", queries, len(ids)), _for_each("keys", keys, len(ids))
    windows = [range(max(0, i), min(i + width, n_layers)) for i in range(-(width // 2), n_layers - width // 2)]
    streams = Streams.from_texts(model, ids, tokens_that_fit(model, "attention.scores", max(map(len, ids))))
    whole, counter, wanted = streams.measure(measured), ProgressCounter(n_layers, progress), _head_mask(model, heads)
    values = torch.empty(n_layers, len(ids), device="cpu")
    for window, found in zip(windows, values, strict=True):
        while streams.layer < window.start:
            streams.advance()
        for some in streams.passes(range(len(ids))):
            rows = slice(some.start, some.stop)
            with streams.resumed(some) as batch, attached(model, _Cut(own_queries[rows], own_keys[rows], window, wanted)):
                found[rows] = measure(model, batch, measured[rows])
        counter.advance()
    return CutWindows(windows, values, whole)


class _Cut:
    """A visitor that hides keys from queries; positions are a list for each row, or one list for all rows."""

    edits, in_path = True, False

    def __init__(
        self,
        queries: Sequence[Sequence[int]] | None,
        keys: Sequence[Sequence[int]] | None,
        layers: Sequence[int],
        heads: Tensor | None,
    ):
        self.queries, self.keys, self.heads = queries, keys, heads
        self.names = {f"layers.{layer}.attention.{part}" for layer in layers for part in ("scores", "pattern")}
        self.blind = torch.zeros(0, device="cpu")  # queries with no keys left: bool (B, H, T, 1)

    def wants(self, name: str) -> bool:
        return name in self.names

    def begin(self, run: Pass) -> None:
        pass

    def visit(self, name: str, value: Tensor, run: Pass | None) -> Tensor:
        assert run is not None
        if name.endswith("pattern"):  # the softmax of a row of only -inf is NaN
            return value.masked_fill(self.blind, 0)
        queries = _there("queries", self.queries, run, Pass.at)
        keys = _there("keys", self.keys, run, lambda own, wanted: _keys_at(own, wanted, value.shape[-1]))
        hidden = queries[:, None, :, None] & keys[:, None, None]  # (B or 1, 1, T, S)
        if self.heads is not None:
            hidden = hidden & self.heads.to(value.device)[:, None, None]
        scores = value.masked_fill(hidden, -torch.inf)
        self.blind = (scores == -torch.inf).all(-1, keepdim=True)
        return scores


def _there(
    what: str, wanted: Sequence[Sequence[int]] | None, run: Pass, find: Callable[[Pass, Sequence[int]], Tensor]
) -> Tensor:
    """Which positions are wanted, found for each row: bool (B or 1, n). Raises RequestError."""
    if wanted is None:
        return torch.ones(1, 1, dtype=torch.bool, device=run.positions.device)
    if run.cache is None:
        ends = run.ends[:, 0].tolist()
        for row in range(max(len(wanted), len(ends))):
            end = ends[row % len(ends)]
            for position in wanted[row % len(wanted)]:
                if not -end <= position < end:
                    raise RequestError(f"cannot cut {what} at position {position}: the text has positions 0 to {end - 1}")
    if len(wanted) == 1:
        return find(run, wanted[0])
    return torch.cat([find(run.of_rows(slice(row, row + 1)), own) for row, own in enumerate(wanted)])


def _keys_at(run: Pass, wanted: Sequence[int], n_keys: int) -> Tensor:
    """Which keys are at these positions: bool (B or 1, n_keys)."""
    chosen = torch.tensor(wanted, dtype=torch.long, device=run.positions.device)
    places = torch.where(chosen < 0, run.ends + chosen, chosen)  # (B or 1, n)
    return (torch.arange(n_keys, device=chosen.device)[:, None] == places[:, None]).any(-1)


def _for_each(what: str, given: Indices | Sequence[Sequence[int]], n: int) -> list[tuple[int, ...]]:
    """Positions for each of n texts."""
    if not isinstance(given, Sequence) or not any(isinstance(own, Sequence) for own in given):
        return [check_indices(what, given)] * n  # type: ignore[arg-type]  # no item is a sequence
    each: list[Indices] = one_each(what, given, n)
    return [check_indices(what, own) for own in each]


def _numbers(what: str, given: Indices | None, count: int) -> list[int]:
    return list(range(count)) if given is None else [check_index(what, i, count) for i in check_indices(what, given)]


def _head_mask(model: Transformer, heads: Indices | None) -> Tensor | None:
    """The chosen query heads as bool (H,), or None for all."""
    if heads is None:
        return None
    out = torch.zeros(whole_args(model).n_heads, dtype=torch.bool, device="cpu")
    out[_numbers("head", heads, whole_args(model).n_heads)] = True
    return out
