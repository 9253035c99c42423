"""Causal tracing: corrupt a text with noise on the embeddings of some of its tokens.

The alternative, other words, needs a second text of the same length. Source: Meng et al., "Locating and
Editing Factual Associations in GPT", arXiv:2202.05262.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
import torch.distributed as dist
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.numbers import is_whole
from llama_ref.parallel.division import division_of
from llama_ref.study.inputs import check_index

EMBEDDED_ROWS = 4096  # rows of the embedding that are read at a time


@dataclass(frozen=True)
class Noise:
    """Normal noise on the embeddings at some positions: `scale` standard deviations of the embedding.

    It replaces a corrupted text; results are means over `seeds`.
    """

    positions: tuple[int, ...]
    scale: float
    seeds: tuple[int, ...]

    def on(self, model: Transformer, n_tokens: int) -> list[Tensor]:
        """The noise that each seed adds to a text's embeddings: float32 (T, D) each, on the model's device.

        The random numbers are the same on every device. Raises RequestError for a position outside the text.
        """
        positions = [check_index("a position of the noise", position, n_tokens) for position in self.positions]
        deviation = self.scale * embedding_deviation(model)
        out = []
        for seed in self.seeds:
            drawn = torch.zeros(n_tokens, model.args.dim, device="cpu")
            generator = torch.Generator("cpu").manual_seed(seed)
            drawn[positions] = torch.randn(len(positions), model.args.dim, generator=generator, device="cpu")
            out.append((deviation * drawn).to(model.device))
        return out


def noise(positions: int | Sequence[int], scale: float = 3.0, seeds: int | Sequence[int] = 10) -> Noise:
    """Make noise for the tokens at `positions` of the clean text, to be used in place of a corrupted text.

    `scale` is in standard deviations of the embedding's entries; `seeds` is the number of seeds, counted
    from 0, or a list of them. Raises RequestError for other values.
    """
    chosen = (positions,) if isinstance(positions, Integral) else positions
    drawn = range(int(seeds)) if is_whole(seeds) else seeds
    for what, given in (("positions", chosen), ("seeds", drawn)):
        if not isinstance(given, Sequence) or not given or not all(map(is_whole, given)):
            raise RequestError(f"{what} is {given!r:.60}, expected a whole number or a list of them, at least one")
    if isinstance(scale, bool) or not isinstance(scale, Real) or not 0 < scale < float("inf"):
        raise RequestError(f"scale is {scale!r:.40}, expected a number above 0")
    return Noise(tuple(int(i) for i in chosen), float(scale), tuple(int(seed) for seed in drawn))


@torch.no_grad()
def embedding_deviation(model: Transformer) -> float:
    """Standard deviation of all entries of the embedding, quantized or not."""
    job, n_rows = division_of(model).job, model.args.vocab_size
    sums = torch.zeros(2, dtype=torch.float64, device=model.device)  # of the entries, and of their squares
    if job.share.is_first_stage:  # the other stages have no embedding
        for ids in torch.arange(n_rows, device=model.device).split(EMBEDDED_ROWS):
            rows = type(model).embed(model, ids).double()  # not as a traced pass
            sums += torch.stack([rows.sum(), rows.pow(2).sum()])
    if job.pipeline_group:
        dist.broadcast(sums, group=job.pipeline_group, group_src=0)
    mean, square = (sums / (n_rows * model.args.dim)).tolist()
    return float((square - mean**2) ** 0.5)
