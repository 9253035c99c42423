"""The logit lens: the next token's probabilities, read from the residual stream at every depth.

The final norm and the output matrix are applied to the residual stream at every point: after the
embedding, after each layer's attention and after each layer's feed-forward. At the last point this
is the model's own prediction, which `predict` returns. Source: nostalgebraist, "interpreting GPT"
(2020).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.linalg import vecdot

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.numbers import is_whole
from llama_ref.parallel.division import whole_args
from llama_ref.study.inputs import check_index, check_token, one_each, one_row
from llama_ref.study.passes.hooks import check_part, read_logits
from llama_ref.study.texts import Text, Texts, as_texts
from llama_ref.study.trace import Trace, trace, trace_each
from llama_ref.study.vision.images import Images

LOGITS_AT_A_TIME = 7 << 20  # float32: 29 MB; a lens holds two such tensors. Fewer rows make products slow
LOGITS_TO_READ = 1 << 20  # at a time on a CPU: they stay in its caches, and each measure reads them again
BLOCK = 128  # tokens of the vocabulary; top-k compares the blocks' maxima first


@dataclass(frozen=True)
class LogitLens:
    """Predictions at P points of the residual stream after the T tokens at `positions`; on the CPU.

    `points` are names of activations. `top_ids` and `top_probabilities` (P, T, k), most likely
    first. `entropy` and `kl` (P, T) are in nats; `kl` is KL(the model's distribution ‖ the point's).
    `target_probability` and `target_rank` (P, T), rank 1 being the most likely, are None without a
    target. `is_tuned`: whether a tuned lens translated the stream first.
    """

    tokens: list[int]
    positions: list[int]
    points: list[str]
    top_ids: Tensor
    top_probabilities: Tensor
    entropy: Tensor
    kl: Tensor
    target: int | None = None
    target_probability: Tensor | None = None
    target_rank: Tensor | None = None
    is_tuned: bool = False

    @property
    def followed(self) -> "Followed | None":
        """The target with its readings, or None."""
        if self.target is None or self.target_probability is None or self.target_rank is None:
            return None
        return Followed(self.target, self.target_probability, self.target_rank)


@dataclass(frozen=True)
class Followed:
    """A lens's target with its probability and rank, (P, T) each."""

    token: int
    probability: Tensor
    rank: Tensor


class Lens(Protocol):
    """Translates the residual stream before it is read: a TunedLens (tuned/lens.py)."""

    @property
    def points(self) -> list[str]: ...  # the points that it can read

    def check(self, model: Transformer) -> None: ...  # raises RequestError for a model that it does not fit

    def translate(self, point: str, residual: Tensor) -> Tensor: ...  # (t, D) -> (t, D)


def residual_points(n_layers: int) -> list[str]:
    """Names of all 2 · n_layers + 1 points of the residual stream, in order."""
    parts = [f"layers.{layer}.residual_{part}" for layer in range(n_layers) for part in ("mid", "post")]
    return ["embedding", *parts]


def layer_ends(n_layers: int) -> list[str]:
    """Names of the n_layers + 1 points that are the embedding or the end of a layer, in order."""
    return residual_points(n_layers)[::2]


def depth(point: str) -> float:
    """Depth of a point in layers: -1 for the embedding, i after layer i, i - 0.5 within it."""
    return -1.0 if point == "embedding" else int(point.split(".")[1]) - 0.5 * point.endswith("residual_mid")


def block_ends(points: Sequence[str]) -> list[int]:
    """Indices of the points that are the embedding or the end of a layer; if there are none, of all points."""
    ends = [p for p, point in enumerate(points) if depth(point).is_integer()]
    return ends or list(range(len(points)))


@torch.no_grad()
def logit_lens(
    model: Transformer,
    tokens: Text,
    *,
    target: int | None = None,
    top: int = 5,
    positions: Sequence[int] | None = None,
    points: Sequence[str] | None = None,
    images: Images | None = None,
    lens: Lens | None = None,
) -> LogitLens:
    """Read the residual stream of one sequence through the final norm and the output matrix.

    `positions` (default: all) may count from the end. `points` are some of `residual_points`, in
    their order (default: all). A tuned `lens` translates the stream first; it reads the embedding
    and the ends of layers. Memory: the stream, D numbers per point and token, and the logits of
    a few positions. Time: one product with the output matrix per point and position. `images` as in
    `trace`. Raises RequestError.
    """
    row = one_row(model, tokens)
    return logit_lenses(model, row, targets=target, top=top, positions=positions, points=points, images=images, lens=lens)[0]


@torch.no_grad()
def logit_lenses(
    model: Transformer,
    texts: Texts,
    *,
    targets: int | Sequence[int | None] | None = None,
    top: int = 5,
    positions: Sequence[int] | None = None,
    points: Sequence[str] | None = None,
    images: Images | None = None,
    lens: Lens | None = None,
) -> list[LogitLens]:
    """Do `logit_lens` for several sequences, whose lengths may differ, many in one pass.

    `targets` is a token for each, or one for all. `positions` are relative to each sequence, so that
    [-1] is the last token of each. Raises RequestError.
    """
    check_part(model)
    rows = as_texts(model, texts)
    at = [_check_positions(positions, len(row)) for row in rows]
    top = check_top(model, top)
    wanted = [None if target is None else check_token(model, target) for target in one_each("targets", targets, len(rows))]
    every = residual_points(whole_args(model).n_layers)
    if lens is not None:
        lens.check(model)
        every = lens.points
    points = every if points is None else _check_points(every, points)
    traces = trace_each(model, rows, [*points, every[-1]], images=images)
    each = zip(traces, at, wanted, strict=True)
    return [_lens(model, traced, points, own_positions, target, top, lens) for traced, own_positions, target in each]


def _lens(
    model: Transformer,
    traced: Trace,
    points: list[str],
    positions: list[int],
    target: int | None,
    top: int,
    lens: Lens | None,
) -> LogitLens:
    """Read one sequence's trace."""
    everywhere = positions == list(range(len(traced.tokens[0])))  # then no copies are needed
    residuals = [traced[point][0] if everywhere else traced[point][0, positions] for point in points]  # P × (T, D)
    if lens is not None:
        residuals = [lens.translate(point, residual) for point, residual in zip(points, residuals, strict=True)]
    last_point = residual_points(traced.model_args.n_layers)[-1]
    last = traced[last_point][0, positions]
    read = _Readings(len(points), len(positions), top, last.device)
    for some in position_chunks(model, len(positions)):
        _read(model, residuals, last, some, target, read)
    if lens is None and points[-1] == last_point:
        read.kl[-1] *= 0  # both are the same distribution, but two products may round differently; keeps NaN
    ids, probabilities, entropy, kl = (x.cpu() for x in (read.top_ids, read.top_probabilities, read.entropy, read.kl))
    tokens, is_tuned = traced.tokens[0].tolist(), lens is not None
    found = LogitLens(tokens, positions, points, ids, probabilities, entropy, kl, is_tuned=is_tuned)
    if target is None:
        return found
    return replace(found, target=target, target_probability=read.probability.cpu(), target_rank=read.rank.cpu())


class _Readings:
    """LogitLens's tensors for P points and T positions, allocated before they are filled.

    Small tensors that a loop allocates and keeps fragment the memory between its large ones, which then
    cannot be reused: a lens of 200 tokens took gigabytes.
    """

    def __init__(self, n_points: int, n_positions: int, top: int, device: torch.device):
        shape = (n_points, n_positions)
        self.top_ids = torch.zeros((*shape, top), dtype=torch.long, device=device)
        self.top_probabilities = torch.zeros((*shape, top), device=device)
        self.entropy = torch.zeros(shape, device=device)
        self.kl = torch.zeros(shape, device=device)
        self.probability = torch.zeros(shape, device=device)  # of the target
        self.rank = torch.zeros(shape, dtype=torch.long, device=device)


def _check_positions(positions: Sequence[int] | None, n_tokens: int) -> list[int]:
    if positions is None:
        return list(range(n_tokens))
    if not isinstance(positions, Sequence):
        raise RequestError(f"positions is {positions!r:.60}, expected a list of them, such as [-1], or None for all")
    if not positions:
        raise RequestError("positions is empty, expected a list of them, or None for all")
    return [check_index("position", position, n_tokens) for position in positions]


def _check_points(every: list[str], points: Sequence[str]) -> list[str]:
    expected = f"expected some of {every[0]}, {every[1]}, …, {every[-1]}, in this order"
    if isinstance(points, str) or not isinstance(points, Sequence):
        raise RequestError(f"points is {points!r:.60}, {expected}")
    strange = [point for point in points if point not in every]
    if strange:
        raise RequestError(f"points contains {strange[0]!r:.60}, {expected}")
    if not points or list(points) != [point for point in every if point in points]:
        raise RequestError(f"points is {list(points)!r:.80}, {expected}")
    return list(points)


def _read(model: Transformer, residuals: list[Tensor], last: Tensor, some: slice, target: int | None, read: _Readings) -> None:
    """Fill in some positions of all points; the residuals are (T, D) each."""
    p_final, negative_entropy = _probabilities(read_logits(model, last[some], is_normed=False))  # (t, V), (t,)
    at_once = max(1, LOGITS_AT_A_TIME // p_final.numel())  # points: with few rows, reading the matrix takes most of the time
    for first in range(0, len(residuals), at_once):
        group = torch.stack([residual[some] for residual in residuals[first : first + at_once]])  # (p, t, D)
        logits = read_logits(model, group, is_normed=False)  # (p, t, V)
        for p, own in enumerate(logits, first):
            for rows, logprobs in _log_probabilities_in_blocks(own):
                at = slice(some.start + rows.start, some.start + rows.stop)
                if target is not None:
                    targets = torch.full_like(read.rank[p, at], target)
                    read.probability[p, at], read.rank[p, at] = probability_and_rank(logprobs, targets)
                read.top_ids[p, at], read.top_probabilities[p, at] = top_tokens(logprobs, read.top_ids.shape[-1])
                kl = negative_entropy[rows] - vecdot(p_final[rows], logprobs)
                read.kl[p, at] = kl.clamp(min=0)  # rounding may make it negative
                read.entropy[p, at] = -vecdot(logprobs.exp(), logprobs)
        del logits, own  # before the next ones are made


def _probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (t, V), and the negative entropy (t,) of each row."""
    probabilities, negative_entropy = torch.empty_like(logits), torch.empty_like(logits[:, 0])
    for rows, logprobs in _log_probabilities_in_blocks(logits):
        torch.exp(logprobs, out=probabilities[rows])
        negative_entropy[rows] = vecdot(probabilities[rows], logprobs)
    return probabilities, negative_entropy


def _log_probabilities_in_blocks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of logits (t, V) with their log-probabilities: blocks that fit a CPU's caches; on other devices, all."""
    n, V = logits.shape
    for rows in _pieces(n, max(1, LOGITS_TO_READ // V) if logits.device.type == "cpu" else n):
        yield rows, logits[rows].log_softmax(-1)


# ---- the model's own predictions


@dataclass(frozen=True)
class Predictions:
    """The model's probability of each of the T tokens of a text, given the tokens before it; on the CPU.

    `probability` and `rank` (T,), rank 1 being the most likely; NaN and 0 for the first token, and for an
    image's place. `top_ids` and `top_probabilities` (T, k) are the most likely tokens after each, most
    likely first: row t - 1 has the alternatives to token t, the last row the next token.
    """

    tokens: list[int]
    probability: Tensor
    rank: Tensor
    top_ids: Tensor
    top_probabilities: Tensor


@torch.no_grad()
def predict(model: Transformer, tokens: Sequence[int] | Tensor, top: int = 5, *, images: Images | None = None) -> Predictions:
    """Predict every token of a sequence, in one pass; `images` as in `trace`. Raises RequestError."""
    row = one_row(model, tokens)
    top = check_top(model, top)
    last = residual_points(whole_args(model).n_layers)[-1]
    residual = trace(model, row, [last], images=images)[last][0]  # (T, D)
    following = torch.cat((row[0, 1:], row[0, :1]))  # (T,) the token after each; the last has none, so any id will do
    is_image = following == model.args.vocab_size  # an image's place, which the model does not predict
    following = following.masked_fill(is_image, 0)
    chunks = []
    for some in position_chunks(model, len(residual)):
        logprobs = log_probabilities(model, residual[some])  # (t, V)
        chunks.append((*probability_and_rank(logprobs, following[some]), *top_tokens(logprobs, top)))
    probability, rank, ids, probabilities = (torch.cat(parts).cpu() for parts in zip(*chunks, strict=True))
    probability, rank = probability.masked_fill(is_image.cpu(), torch.nan), rank.masked_fill(is_image.cpu(), 0)
    return Predictions(
        row[0].tolist(),
        torch.cat((torch.full_like(probability[:1], torch.nan), probability[:-1])),
        torch.cat((torch.zeros_like(rank[:1]), rank[:-1])),
        ids,
        probabilities,
    )


# ---- from residuals to probabilities, a few positions at a time


def check_top(model: Transformer, top: int) -> int:
    """Return the number. Raises RequestError unless it is from 1 to the size of the vocabulary."""
    if not is_whole(top) or not 1 <= top <= model.args.vocab_size:
        raise RequestError(f"top is {top!r:.40}, expected a whole number from 1 to {model.args.vocab_size}")
    return int(top)


def position_chunks(model: Transformer, n: int) -> Iterator[slice]:
    """Split n positions into chunks of at most LOGITS_AT_A_TIME logits."""
    return _pieces(n, max(1, LOGITS_AT_A_TIME // model.args.vocab_size))


def _pieces(n: int, most: int) -> Iterator[slice]:
    """Split range(n) into as few pieces of at most `most` as possible, of about equal lengths."""
    count = -(-n // most)
    return (slice(n * i // count, n * (i + 1) // count) for i in range(count))


def log_probabilities(model: Transformer, residual: Tensor) -> Tensor:
    """Apply the final norm and the output matrix: (t, D) -> float32 (t, V)."""
    return read_logits(model, residual, is_normed=False).log_softmax(-1)


def probability_and_rank(logprobs: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Probability and rank of one token per row, (t,) each; a row of NaN ranks it last."""
    own = logprobs.gather(-1, ids[:, None])
    others = logprobs.shape[-1] - (logprobs <= own).float().sum(-1).long()  # float32 counts exactly up to 2**24
    return own[:, 0].exp(), 1 + others


def top_tokens(logprobs: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Ids and probabilities of the most likely tokens, (t, top) each."""
    n_blocks, rest = divmod(logprobs.shape[-1], BLOCK)
    if rest or n_blocks < 4 * top:
        values, ids = logprobs.topk(top)
    else:  # only search the blocks with the largest maxima: on a CPU this takes a sixth of the time
        blocks = logprobs.unflatten(-1, (n_blocks, BLOCK))  # (t, blocks, 128)
        best = blocks.amax(-1).topk(top).indices  # (t, top)
        values, places = blocks.gather(1, best[..., None].expand(-1, -1, BLOCK)).flatten(1).topk(top)
        ids = best.gather(1, places // BLOCK) * BLOCK + places % BLOCK
    return ids, values.exp()
