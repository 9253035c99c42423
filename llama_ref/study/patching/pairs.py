"""Check the pairs of texts that a grid compares, and prepare their runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.study.inputs import one_each
from llama_ref.study.patching.metrics import Metric
from llama_ref.study.patching.noise import Noise
from llama_ref.study.patching.streams import Streams
from llama_ref.study.texts import Texts, as_texts

Corrupted = Texts | Noise | Sequence[Noise]  # texts, or noise on the clean ones


@dataclass(frozen=True)
class Pair:
    """A clean and a corrupted text, ids (T,), with the metric; or, with `noise`, the clean text twice."""

    clean: Tensor
    corrupted: Tensor
    metric: Metric
    noise: Noise | None = None

    @property
    def n_runs(self) -> int:
        """The number of corrupted runs: one for each seed of the noise."""
        return len(self.noise.seeds) if self.noise else 1


def as_pairs(model: Transformer, clean: Texts, corrupted: Corrupted, metrics: Metric | Sequence[Metric]) -> list[Pair]:
    """The pairs of texts with their metrics. Raises RequestError if the texts do not match."""
    texts = as_texts(model, clean)
    noises = _noises(corrupted, len(texts))
    others = as_texts(model, corrupted) if noises is None else texts  # type: ignore[arg-type]  # no noise
    if len(texts) != len(others):
        raise RequestError(f"there are {len(texts)} clean and {len(others)} corrupted texts, expected as many of each")
    pairs = [Pair(*each) for each in zip(texts, others, one_each("metrics", metrics, len(texts)), strict=True)]
    if noises is not None:
        pairs = [replace(pair, noise=own) for pair, own in zip(pairs, noises, strict=True)]
    for i, pair in enumerate(pairs):
        _check(pair, f"in pair {i}, " if len(pairs) > 1 else "")
    return pairs


def _noises(corrupted: Corrupted, n: int) -> list[Noise] | None:
    """The noise of each pair; None if texts were given."""
    parts = [corrupted] if isinstance(corrupted, Noise) else corrupted
    if not isinstance(parts, Sequence) or not any(isinstance(part, Noise) for part in parts):
        return None
    if not all(isinstance(part, Noise) for part in parts):
        raise RequestError("corrupted has both texts and noise, expected one of the two")
    return one_each("corrupted", corrupted, n)  # type: ignore[arg-type]  # noise only


def _check(pair: Pair, where: str) -> None:
    if not callable(pair.metric):
        expected = "expected logit_difference(…), probability(…), log_probability(…) or a function of logits"
        raise RequestError(f"{where}metric is {pair.metric!r:.60}, {expected}")
    if len(pair.clean) != len(pair.corrupted):
        raise RequestError(
            f"{where}the clean text has {len(pair.clean)} tokens and the corrupted text {len(pair.corrupted)}, expected two"
            " of the same length"
        )


@dataclass(frozen=True)
class Baselines:
    """The streams of all runs of some pairs, before layer 0, and the metric of each pair's two texts: (pairs,)."""

    clean: Streams
    corrupted: Streams
    clean_metrics: list[float]
    corrupted_metrics: list[float]

    @classmethod
    def from_pairs(cls, model: Transformer, pairs: Sequence[Pair], pass_tokens: int) -> "Baselines":
        clean, corrupted = clean_streams(model, pairs, pass_tokens), corrupted_streams(model, pairs, pass_tokens)
        means = mean_over_seeds(corrupted.measure(run_metrics(pairs)), pairs)
        return cls(clean, corrupted, clean.measure([pair.metric for pair in pairs]).tolist(), [mean.item() for mean in means])


def clean_streams(model: Transformer, pairs: Iterable[Pair], pass_tokens: int) -> Streams:
    """The residual streams of all clean texts, before layer 0."""
    return Streams.from_texts(model, [pair.clean for pair in pairs], pass_tokens)


def corrupted_streams(model: Transformer, pairs: Iterable[Pair], pass_tokens: int) -> Streams:
    """The residual streams of all corrupted runs, before layer 0: `n_runs` of each pair, in the order of the pairs."""
    texts: list[Tensor] = []
    added: list[Tensor | None] = []
    for pair in pairs:
        texts += [pair.corrupted] * pair.n_runs
        added += pair.noise.on(model, len(pair.clean)) if pair.noise else [None]
    return Streams.from_texts(model, texts, pass_tokens, added)


def run_owners(pairs: Iterable[Pair]) -> list[int]:
    """The index of every corrupted run's pair."""
    return [i for i, pair in enumerate(pairs) for _ in range(pair.n_runs)]


def run_metrics(pairs: Iterable[Pair]) -> list[Metric]:
    """The metric of every corrupted run."""
    return [pair.metric for pair in pairs for _ in range(pair.n_runs)]


def mean_over_seeds(values: Tensor, pairs: Sequence[Pair]) -> list[Tensor]:
    """Split values of all corrupted runs (runs, …) by pair, and average each pair's: (…)."""
    return [own.double().mean(0).to(values.dtype) for own in values.split([pair.n_runs for pair in pairs])]
