"""What the model made of every token before it had seen it, and what it would say next."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ref.model import Transformer
from llama_ref.study.inputs import one_row
from llama_ref.study.logit_lens import a_few_at_a_time, check_top, likeliest, log_probabilities, of_tokens
from llama_ref.study.trace import trace


@dataclass(frozen=True)
class Predictions:
    """How a model expected the T tokens of a text, each from those before it; all on the CPU.

    `probability` and `rank` (T,) are what each token had, rank 1 being the likeliest; NaN and 0 for the first, which nothing
    foretells. `top_ids` and `top_probabilities` (T, k) are the likeliest tokens to come after each, likeliest first: row t - 1
    holds the alternatives to token t, and the last row what comes next.
    """

    tokens: list[int]
    probability: Tensor
    rank: Tensor
    top_ids: Tensor
    top_probabilities: Tensor


@torch.no_grad()
def predict(model: Transformer, tokens: Sequence[int] | Tensor, top: int = 5) -> Predictions:
    """Read one sequence in one pass. Holds the logits of a few positions at a time. Raises RequestError."""
    row = one_row(model, tokens)
    check_top(model, top)
    last = f"layers.{model.args.n_layers - 1}.residual_post"
    residual = trace(model, row, [last])[last][0]  # (T, D)
    came = torch.cat((row[0, 1:], row[0, :1]))  # (T,) what came after each; after the last nothing did, and any id will do
    chunks = []
    for some in a_few_at_a_time(model, len(residual)):
        logprobs = log_probabilities(model, residual[some])  # (t, V)
        chunks.append((*of_tokens(logprobs, came[some]), *likeliest(logprobs, top)))
    probability, rank, ids, probabilities = (torch.cat(parts).cpu() for parts in zip(*chunks, strict=True))
    return Predictions(
        row[0].tolist(),
        torch.cat((torch.full_like(probability[:1], torch.nan), probability[:-1])),
        torch.cat((torch.zeros_like(rank[:1]), rank[:-1])),
        ids,
        probabilities,
    )
