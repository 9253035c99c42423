"""Length and direction of the residual stream through the layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ref.model import Transformer
from llama_ref.parallel.division import whole_args
from llama_ref.study.analyses.logit_lens import residual_points
from llama_ref.study.inputs import one_row
from llama_ref.study.trace import trace
from llama_ref.study.vision.images import Images


@dataclass(frozen=True)
class ResidualStream:
    """The stream's length and direction at P points, for T tokens: float32 (P, T) each, on the CPU.

    `norm` is the Euclidean length. `drift` is the cosine with the previous point (1 at the first),
    `to_last` the cosine with the last point.
    """

    tokens: list[int]
    points: list[str]
    norm: Tensor
    drift: Tensor
    to_last: Tensor


def quartiles_of_others(values: Tensor) -> Tensor:
    """Quartiles over all tokens but the first: (P, T) -> (3, P); NaN if there are no others.

    The first token is an attention sink and may be a hundred times as long as the others.
    """
    if values.shape[1] == 1:
        return values.new_full((3, len(values)), torch.nan)
    at = values.new_tensor([0.25, 0.5, 0.75])
    return torch.stack([row[1:].quantile(at) for row in values], dim=1)  # by row: quantile takes at most 2²⁴ numbers


@torch.no_grad()
def residual_stream(model: Transformer, tokens: Sequence[int] | Tensor, *, images: Images | None = None) -> ResidualStream:
    """Measure one sequence's residual stream at all its points; `images` as in `trace`. Raises RequestError."""
    row = one_row(model, tokens)
    points = residual_points(whole_args(model).n_layers)
    traced = trace(model, row, points, images=images)
    stream = [traced[point][0] for point in points]  # P × (T, D), converted to float32 one at a time
    norm = torch.stack([x.float().norm(dim=-1) for x in stream])
    drift = [torch.ones_like(norm[0]), *(_cosine(before, after) for before, after in pairwise(stream))]
    to_last = [_cosine(x, stream[-1]) for x in stream]
    return ResidualStream(row[0].tolist(), points, norm.cpu(), torch.stack(drift).cpu(), torch.stack(to_last).cpu())


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.float(), b.float(), dim=-1)
