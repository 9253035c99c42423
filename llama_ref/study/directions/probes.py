"""A linear probe: can a property of a text be read from an activation? Needs scikit-learn (extra `probe`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.study.directions.extraction import check_rows


@dataclass(frozen=True)
class Probe:
    """Logistic regression: a text is of the second kind where `x @ direction + bias` is above 0.

    `direction` (D,) and `bias` are in the units of the activations. `accuracy` is measured on
    `n_held_out` rows that were not used for the fit; `majority` is the accuracy of always predicting the
    more frequent kind of these rows.
    """

    direction: Tensor
    bias: float
    accuracy: float
    majority: float
    train_accuracy: float
    n_held_out: int

    def scores(self, rows: Tensor) -> Tensor:
        """Log-odds (n,) of the second kind, for activations (n, D)."""
        return check_rows("rows", rows) @ self.direction + self.bias


def fit_probe(
    rows: Tensor, labels: Sequence[bool] | Tensor, *, held_out: float = 0.25, strength: float = 1.0, seed: int = 0
) -> Probe:
    """Fit a probe to activations (n, D) and their labels, true for the second kind.

    Rows are standardized with the mean and deviation of the fitted rows. `held_out` is the share of each
    kind that is used only for scoring; rows of the same text, or of near-duplicate texts, should not be on
    both sides. `strength` is the inverse of L2 regularization. Raises RequestError.
    """
    rows = check_rows("rows", rows)
    kinds = torch.as_tensor(labels).to("cpu").bool()
    if kinds.shape != rows.shape[:1] or min(int(kinds.sum()), int((~kinds).sum())) < 2:
        raise RequestError(f"labels are {tuple(kinds.shape)}, expected ({len(rows)},) with at least two of each kind")
    if not 0 < held_out < 1:
        raise RequestError(f"held_out is {held_out!r:.40}, expected a share between 0 and 1")
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise RequestError("probes need scikit-learn: pip install '.[probe]'") from error
    try:
        split = train_test_split(range(len(rows)), test_size=held_out, stratify=kinds.numpy(), random_state=seed)
    except ValueError as error:
        raise RequestError(f"{len(rows)} rows cannot be split with held_out {held_out}: {error}") from error
    train, test = split
    mean, spread = rows[train].mean(0), rows[train].std(0).clamp(min=1e-6)
    fitted = LogisticRegression(C=strength, max_iter=1000).fit(((rows[train] - mean) / spread).numpy(), kinds[train].numpy())
    direction = torch.from_numpy(fitted.coef_[0]).float() / spread
    bias = float(fitted.intercept_[0]) - float(mean @ direction)

    def accuracy(some: list[int]) -> float:
        return ((rows[some] @ direction + bias > 0) == kinds[some]).float().mean().item()

    share = kinds[test].float().mean().item()
    return Probe(direction, bias, accuracy(test), max(share, 1 - share), accuracy(train), len(test))
