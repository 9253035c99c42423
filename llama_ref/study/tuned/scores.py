"""Score a lens: its distance from the model's own predictions, and its calibration.

The expected calibration error is defined as in Guo et al., arXiv:1706.04599: the mean difference between
the probability of the likeliest token and the share of times that this token comes next.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vecdot

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.parallel.division import whole_args
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.study.analyses.logit_lens import Lens, layer_ends, log_probabilities, position_chunks
from llama_ref.study.passes.hooks import check_part
from llama_ref.study.texts import Texts, as_texts
from llama_ref.study.trace import trace_each

BINS = 15  # equally wide bins of the likeliest token's probability


@dataclass(frozen=True)
class LensScores:
    """Means over `n_tokens` positions of texts, at P points of the residual stream: (P,) each, CPU.

    `kl` is KL(the model's distribution ‖ the lens's), `cross_entropy` the lens's loss on the texts' next
    tokens, both in nats; `calibration_error` is from 0 to 1.
    """

    points: list[str]
    kl: Tensor
    cross_entropy: Tensor
    calibration_error: Tensor
    n_tokens: int


@torch.no_grad()
def score_lens(model: Transformer, texts: Texts, lens: Lens | None = None, *, progress: Progress | None = None) -> LensScores:
    """Score a lens (default: the logit lens) on texts' ids, after the embedding and every layer.

    Every position is scored except the last of each text, which no token follows. `progress` is
    called with the texts done and their number. Raises RequestError if all texts have one token, or
    for a lens of another model.
    """
    check_part(model)
    rows = as_texts(model, texts)
    if lens is not None:
        lens.check(model)
    points = layer_ends(whole_args(model).n_layers)
    sums = _Sums(len(points))
    counter = ProgressCounter(len(rows), progress)
    for row, traced in zip(rows, trace_each(model, rows, points), strict=True):
        following = row[1:].to(model.device)
        residuals = [traced[point][0, :-1] for point in points]
        for some in position_chunks(model, len(following)):
            final = log_probabilities(model, residuals[-1][some])
            for p, point in enumerate(points):
                residual = residuals[p][some]
                own = log_probabilities(model, residual if lens is None else lens.translate(point, residual))
                sums.add(p, final, own, following[some])
        counter.advance()
    if not sums.n_tokens:
        raise RequestError("the texts have one token each: there is no next token to score")
    return LensScores(points, *sums.means(), sums.n_tokens)


class _Sums:
    """Running sums over positions for P points; `bins` (P, BINS, 3) has counts, confidence and hits."""

    def __init__(self, n_points: int):
        self.kl = torch.zeros(n_points, dtype=torch.float64, device="cpu")
        self.cross_entropy = torch.zeros_like(self.kl)
        self.bins = torch.zeros(n_points, BINS, 3, dtype=torch.float64, device="cpu")

    @property
    def n_tokens(self) -> int:
        return int(self.bins[0, :, 0].sum())

    def add(self, p: int, final: Tensor, own: Tensor, following: Tensor) -> None:
        """Add some positions of one point: the model's and the lens's log-probabilities (t, V), and the next ids (t,)."""
        p_final = final.exp()
        self.kl[p] += (vecdot(p_final, final) - vecdot(p_final, own)).clamp(min=0).sum().cpu()
        self.cross_entropy[p] -= own.gather(-1, following[:, None]).sum().cpu()
        best = own.max(-1)
        confidence = best.values.exp()
        hits = (best.indices == following).to(confidence.dtype)
        counted = torch.stack((torch.ones_like(hits), confidence, hits), -1).double().cpu()
        index = (confidence.nan_to_num() * BINS).long().clamp(max=BINS - 1).cpu()
        self.bins[p].index_add_(0, index, counted)

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """KL, cross-entropy and calibration error of every point."""
        counts, confidence, hits = self.bins.unbind(-1)
        error = (confidence - hits).abs().sum(-1) / counts.sum(-1)
        return (self.kl / self.n_tokens).float(), (self.cross_entropy / self.n_tokens).float(), error.float()
