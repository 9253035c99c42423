"""The tuned lens: the logit lens after an affine translator of each layer's residual stream.

Earlier layers represent predictions differently from the last layer; h + W h + b translates. Belrose
et al., "Eliciting Latent Predictions from Transformers with the Tuned Lens", arXiv:2303.08112.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.parallel.division import whole_args
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.study.analyses.logit_lens import layer_ends
from llama_ref.study.inputs import seeded
from llama_ref.study.passes.hooks import check_model, check_part
from llama_ref.study.texts import Text, as_texts
from llama_ref.study.tuned.files import Stored, check_target, read_folder, write_folder
from llama_ref.study.tuned.fit import FitSettings, Optimizer, Translators, batches, translated
from llama_ref.study.tuned.scores import LensScores, score_lens
from llama_ref.study.tuned.unembed_hash import unembed_hash

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """Scores of both lenses on the texts that were held out from the fit."""

    logit: LensScores
    tuned: LensScores


@dataclass(frozen=True, eq=False)
class TunedLens:
    """Translators of the embedding and of the end of every layer but the last, for `logit_lens(…, lens=…)`.

    `weights` has a (D, D) and `biases` a (D,) for each of L points: the embedding first, then
    layers 0 to L - 2. `base_model` names the model, `unembed_hash` its output matrix
    (unembed_hash.py), if known. `held_out` has scores only after `fit`.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    base_model: str = ""
    unembed_hash: str | None = None
    held_out: HeldOut | None = None

    @property
    def points(self) -> list[str]:
        """The names of the points that the lens can read; the last has no translator."""
        return layer_ends(len(self.weights))

    def translate(self, point: str, residual: Tensor) -> Tensor:
        """Translate residuals (t, D) of a point to the last layer's terms, in their dtype."""
        layer = self.points.index(point)
        if layer == len(self.weights):
            return residual
        weight, bias = (x.to(residual.device, torch.float32) for x in (self.weights[layer], self.biases[layer]))
        return translated(residual, weight, bias)

    def check(self, model: Transformer) -> None:
        """Raise RequestError for a model of another shape; log a warning for another output matrix."""
        check_part(model)
        args = whole_args(model)
        shape, own = (len(self.weights), len(self.biases[0])), (args.n_layers, args.dim)
        if shape != own:
            raise RequestError(
                f"the tuned lens is for a model of {shape[0]} layers and {shape[1]:,} dimensions, but this one has {own[0]} and"
                f" {own[1]:,}: use a lens for this model"
            )
        found = unembed_hash(model)
        if self.unembed_hash is not None and found is not None and found != self.unembed_hash:
            of = f" of {self.base_model}" if self.base_model else ""
            logger.warning("the tuned lens%s was fitted to another output matrix: its predictions may mean little here", of)

    def save(self, path: str | Path) -> None:
        """Write a new folder in the published format, which the package tuned-lens reads too.

        Raises RequestError if the folder is not empty, CheckpointError if it cannot be written.
        """
        write_folder(path, Stored(list(self.weights), list(self.biases), self.base_model, self.unembed_hash))

    @classmethod
    def load(cls, path: str | Path) -> "TunedLens":
        """Read a folder in the published format; its tensors are memory-mapped. Raises CheckpointError."""
        stored = read_folder(path)
        return cls(stored.weights, stored.biases, stored.base_model, stored.unembed_hash)

    @classmethod
    @torch.inference_mode(False)  # gradients need tensors that were made outside of inference mode
    def fit(
        cls,
        model: Transformer,
        texts: Sequence[Text],
        *,
        steps: int = 250,
        tokens_per_step: int = 1024,
        held_out: float = 0.1,
        optimizer: Optimizer = "sgd",
        rate: float | None = None,
        seed: int = 0,
        to: str | Path | None = None,
        base_model: str = "",
        progress: Progress | None = None,
    ) -> "TunedLens":
        """Fit translators on texts' ids, to minimize the KL to the model's own predictions.

        `held_out` is the share of texts that are used only to score the result. `steps`, `tokens_per_step`,
        `optimizer`, `rate` and `seed` are described in fit.py's FitSettings. With `to`, a new folder, the
        lens is saved when it is done, or after Ctrl-C with what has been learned so far. `progress` is
        called with the steps done and their number. Memory: the translators three times (five with Adam),
        float32, on the model's device; the residual streams of one pass; the logits of a few positions.
        Time: three products with the output matrix for each layer and token. Raises RequestError.
        """
        check_model(model)
        rows = as_texts(model, texts)
        settings = FitSettings(steps, tokens_per_step, optimizer, rate, seed)
        for_fit, for_scores = _split(rows, held_out, seed)
        folder = None if to is None else check_target(to)
        fitting = Translators(model, layer_ends(model.args.n_layers)[:-1], settings)
        counter = ProgressCounter(steps, progress)
        try:
            for step, batch in zip(range(steps), batches(for_fit, tokens_per_step, seed), strict=False):
                fitting.step(step, batch)
                counter.advance()
        except KeyboardInterrupt:
            if folder is not None and counter.done:
                cls._from_fit(fitting, base_model).save(folder)
                logger.info("interrupted: the lens after %d of %d steps is in %s", counter.done, steps, folder)
            raise
        lens = cls._from_fit(fitting, base_model)
        if folder is not None:
            lens.save(folder)
        return replace(lens, held_out=HeldOut(score_lens(model, for_scores), score_lens(model, for_scores, lens)))

    @classmethod
    def _from_fit(cls, fitting: Translators, base_model: str) -> "TunedLens":
        weights, biases = ([x.detach().cpu() for x in own] for own in (fitting.weights, fitting.biases))
        if not all(x.isfinite().all() for x in (*weights, *biases)):
            raise RequestError("the fit diverged, and its numbers are not finite: choose a smaller rate")
        return cls(weights, biases, base_model, unembed_hash(fitting.model))


def _split(rows: list[Tensor], held_out: float, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Split texts at random: those to fit, and those to score. Raises RequestError if there are too few."""
    share = -1.0
    with suppress(TypeError, ValueError):
        share = float(held_out)
    if not 0 < share < 1:
        raise RequestError(f"held_out is {held_out!r:.40}, expected a share between 0 and 1")
    n_scored = max(1, round(share * len(rows)))
    if n_scored >= len(rows):
        found = f"{len(rows)} text{'s' if len(rows) > 1 else ''}"
        raise RequestError(f"cannot score {share:.0%} of {found} and fit to the others: give more texts, or split them")
    order = torch.randperm(len(rows), generator=seeded(seed), device="cpu").tolist()
    return [rows[i] for i in order[n_scored:]], [rows[i] for i in order[:n_scored]]
