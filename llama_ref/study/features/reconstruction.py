"""How well a dictionary reconstructs an activation: loss with its output in place, L0, unexplained variance."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.study.features.active import Active
from llama_ref.study.features.cross_layer import CrossLayerTranscoder, reads_of
from llama_ref.study.features.dictionary import Features
from llama_ref.study.features.edits import Edits, replace_by_reconstruction
from llama_ref.study.inputs import check_count
from llama_ref.study.losses import loss_sums
from llama_ref.study.passes.pass_size import split_passes
from llama_ref.study.patch import patch, zero
from llama_ref.study.texts import Batch, Texts, as_texts
from llama_ref.study.trace import Trace, recording


@dataclass(frozen=True)
class Reconstruction:
    """Means over the tokens of texts; losses of the next token, in nats.

    `loss` is the model's, `loss_reconstructed` with the activation replaced by the dictionary's output,
    `loss_zero` with zero in its place. `l0` is the mean number of features that fire at a token, `alive` the
    number that fire at any token. `unexplained` is the squared error divided by the activation's variance
    over all tokens. For a cross-layer transcoder the outputs of all feed-forwards are replaced, features of
    all layers count, and `unexplained` is the mean over the layers.
    """

    loss: float
    loss_reconstructed: float
    loss_zero: float
    l0: float
    alive: int
    unexplained: float
    n_tokens: int

    @property
    def loss_recovered(self) -> float:
        """1 for a perfect dictionary, 0 for one as bad as zero: (zero − reconstructed) / (zero − loss)."""
        lost = self.loss_zero - self.loss
        return (self.loss_zero - self.loss_reconstructed) / lost if lost else float("nan")


@torch.no_grad()
def measure_reconstruction(
    model: Transformer,
    features: Features | CrossLayerTranscoder,
    texts: Texts,
    *,
    skip: int = 0,
    progress: Progress | None = None,
) -> Reconstruction:
    """Measure how well a dictionary reconstructs an activation, on texts of ids.

    The first `skip` tokens of each text keep their activation and are not counted: many dictionaries were
    not trained on begin-of-text, whose residual is far longer than that of other tokens. `progress` is
    called with (texts done, all texts). Raises RequestError for texts without a token to predict, features
    of another model, or one layer of a cross-layer transcoder.
    """
    features.check(model)
    skip = check_count("skip", skip)
    ids = as_texts(model, texts)
    if min(map(len, ids)) < skip + 2:
        raise RequestError(f"a text has {min(map(len, ids))} tokens, expected {skip + 2} or more: one to read, one to predict")
    replace_by_reconstruction(features)  # raises now, not after the first pass
    losses, variance = torch.zeros(3, dtype=torch.float64), _Variance(features)
    n_predicted, counter = 0, ProgressCounter(len(ids), progress)
    for some in split_passes(list(map(len, ids))):
        batch = Batch.from_texts(model, ids[some.start : some.stop])
        positions = list(range(skip, batch.ids.shape[1]))
        with recording(model, [*reads_of(features), *features.writes]) as seen:
            losses[0] += _loss(model, batch, skip)
        variance.add(seen.trace, batch.lengths, skip)
        replaced = replace_by_reconstruction(features, positions=positions)
        for i, edits in enumerate((replaced, dict.fromkeys(features.writes, zero().at(positions=positions))), 1):
            losses[i] += _loss(model, batch, skip, edits)
        n_predicted += sum(length - 1 - skip for length in batch.lengths)
        counter.advance(len(some))
    loss, reconstructed, zeroed = (losses / n_predicted).tolist()
    return Reconstruction(
        loss,
        reconstructed,
        zeroed,
        variance.n_active / variance.n,
        sum(int(fired.sum()) for fired in variance.fired),
        variance.unexplained(),
        variance.n,
    )


def _loss(model: Transformer, batch: Batch, skip: int, edits: Edits | None = None) -> float:
    """The sum of the losses of all tokens after position `skip`."""
    with nullcontext() if edits is None else patch(model, edits):
        hidden = batch.hidden(model)
    return float(loss_sums(model, batch, hidden, skip).double().sum())


class _Variance:
    """Running sums over tokens, for each activation that is written."""

    def __init__(self, features: Features | CrossLayerTranscoder):
        self.features = features
        self.n = self.n_active = 0
        n_written = len(features.writes)
        self.error, self.squares = torch.zeros(2, n_written, dtype=torch.float64, device="cpu")
        self.total = torch.zeros(n_written, features.dim, dtype=torch.float64, device="cpu")
        each = features.layers if isinstance(features, CrossLayerTranscoder) else [features]
        self.fired = [torch.zeros(len(own), dtype=torch.bool, device="cpu") for own in each]

    def add(self, seen: Trace, lengths: Sequence[int], skip: int) -> None:
        for row, length in enumerate(lengths):
            tokens = slice(skip, length)
            found, outputs = _explain(self.features, [seen[name][row, tokens] for name in reads_of(self.features)])
            self.n += length - skip
            for fired, active in zip(self.fired, found, strict=True):
                self.n_active += len(active.values)
                fired[active.features.cpu()] = True
            for i, (name, output) in enumerate(zip(self.features.writes, outputs, strict=True)):
                y = seen[name][row, tokens].double()
                self.error[i] += (y - output.double()).square().sum().cpu()
                self.squares[i] += y.square().sum().cpu()
                self.total[i] += y.sum(0).cpu()

    def unexplained(self) -> float:
        spread = self.squares - self.total.square().sum(1) / self.n
        return float((self.error / spread.where(spread > 0, float("nan"))).mean())


def _explain(features: Features | CrossLayerTranscoder, x: list[Tensor]) -> tuple[list[Active], Iterator[Tensor]]:
    """The features that fire in each layer's dictionary, and the reconstructed outputs (tokens, D)."""
    if isinstance(features, CrossLayerTranscoder):
        each = features.active(x)
        return each, (features.decode_layer(layer, each) for layer in range(len(each)))
    found = features.active(x[0])
    return [found], iter([features.decode_active(found, x[0])])
