"""Fit a tuned lens: stochastic gradient descent on the KL to the model's own predictions.

Each layer's translator is fitted independently, all from the same passes. Belrose et al., "Eliciting
Latent Predictions from Transformers with the Tuned Lens", arXiv:2303.08112.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import vecdot

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.study.analyses.logit_lens import log_probabilities, position_chunks
from llama_ref.study.inputs import check_count, seeded
from llama_ref.study.passes.gradients import gradients
from llama_ref.study.trace import trace_each

Optimizer = Literal["sgd", "adam"]

MOMENTUM, WEIGHT_DECAY, LARGEST_GRADIENT = 0.9, 1e-3, 1.0
RATES: dict[str, float] = {"sgd": 1.0, "adam": 1e-3}
ADAM_WARM_UP = 0.2  # share of all steps in which the rate rises


@dataclass(frozen=True)
class FitSettings:
    """How to fit: `steps` updates, each from texts of `tokens_per_step` tokens or a little more.

    The learning rate falls from `rate` to 0; None: 1 for SGD, 0.001 for Adam. SGD has Nesterov
    momentum of 0.9, and its rate applies to the running mean of gradients. `seed` shuffles the texts.
    """

    steps: int = 250
    tokens_per_step: int = 1024
    optimizer: Optimizer = "sgd"
    rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "tokens_per_step"):
            check_count(name, getattr(self, name), 1)
        if self.optimizer not in RATES:
            raise RequestError(f"optimizer is {self.optimizer!r:.40}, expected sgd or adam")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise RequestError(f"rate is {self.rate!r:.40}, expected a number above 0, or None for the optimizer's own")

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        rate = RATES[self.optimizer] if self.rate is None else self.rate
        warm_up = ADAM_WARM_UP * self.steps if self.optimizer == "adam" else 0
        return rate * min(1, (step + 1) / max(1, warm_up)) * (1 - step / self.steps)


class Translators:
    """The translators of some points of the residual stream, during fitting.

    `weights` (D, D) and `biases` (D,), float32 on the model's device, start at 0, which is the logit lens.
    """

    def __init__(self, model: Transformer, points: Sequence[str], settings: FitSettings):
        D = model.args.dim
        self.model, self.points, self.settings = model, points, settings
        self.weights = [torch.zeros(D, D, device=model.device, requires_grad=True) for _ in points]
        self.biases = [torch.zeros(D, device=model.device, requires_grad=True) for _ in points]
        self.last = f"layers.{model.args.n_layers - 1}.residual_post"
        parameters = [*self.weights, *self.biases]
        if settings.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                parameters, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
            )
        else:
            self.optimizer = torch.optim.Adam(parameters, betas=(MOMENTUM, 0.999), amsgrad=True, weight_decay=WEIGHT_DECAY)

    def step(self, number: int, texts: Sequence[Tensor]) -> None:
        """Update all translators once, from all positions of texts (T,)."""
        n_tokens = sum(map(len, texts))
        for parameter in (*self.weights, *self.biases):
            parameter.grad = torch.zeros_like(parameter)
        for traced in trace_each(self.model, texts, [*self.points, self.last]):
            residuals = [traced[point][0] for point in self.points]
            self._add_gradients(residuals, traced[self.last][0], n_tokens)
        for pair in zip(self.weights, self.biases, strict=True):
            torch.nn.utils.clip_grad_norm_(pair, LARGEST_GRADIENT)
        rate = self.settings.rate_at(number) * (1 - MOMENTUM if self.settings.optimizer == "sgd" else 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def _add_gradients(self, residuals: list[Tensor], last: Tensor, n_tokens: int) -> None:
        """Add one text's share of the mean KL's gradients; a few positions and one layer at a time."""
        for some in position_chunks(self.model, len(last)):
            with torch.no_grad():
                p_final = log_probabilities(self.model, last[some]).exp()
            with gradients(self.model):
                for weight, bias, residual in zip(self.weights, self.biases, residuals, strict=True):
                    own = log_probabilities(self.model, translated(residual[some], weight, bias))
                    # KL without the model's own entropy, which is constant here
                    loss = -vecdot(p_final, own).sum() / n_tokens
                    for parameter, gradient in zip((weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True):
                        assert parameter.grad is not None
                        parameter.grad += gradient


def translated(residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute h + W h + b for residuals (t, D), in float32; returned in their dtype."""
    wide = residual.float()
    return (wide + wide @ weight.T + bias).to(residual.dtype)


def batches(texts: Sequence[Tensor], n_tokens: int, seed: int) -> Iterator[list[Tensor]]:
    """Yield batches of texts with at least `n_tokens` tokens together, endlessly: all texts in random order, repeatedly."""
    generator = seeded(seed)
    batch: list[Tensor] = []
    while True:
        for i in torch.randperm(len(texts), generator=generator, device="cpu").tolist():
            batch.append(texts[i])
            if sum(map(len, batch)) >= n_tokens:
                yield batch
                batch = []
