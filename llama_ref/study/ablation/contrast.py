"""Units that tell two kinds of texts apart, found on one half of the texts and checked on the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.study.inputs import check_count, seeded
from llama_ref.study.passes.hooks import check_part
from llama_ref.study.texts import Text, as_texts
from llama_ref.study.trace import trace_each


@dataclass(frozen=True)
class UnitContrast:
    """How units of feed-forwards differ between two kinds of texts: float32 (n_layers, F) each, on the CPU.

    `difference` of the means and Welch's `t` are computed on one half of the texts, `held_out_t` on the
    other: among thousands of units some have a large t by chance, which the other half does not confirm.
    t is 0 where a unit does not vary.
    """

    difference: Tensor
    t: Tensor
    held_out_t: Tensor

    def top(self, n: int = 10) -> list[tuple[str, float, float]]:
        """The n units with the largest |t|: name as in a `Sweep`, t, t of the held-out half."""
        order = self.t.flatten().abs().argsort(descending=True, stable=True)[: check_count("n", n)].tolist()
        places = [divmod(i, self.t.shape[1]) for i in order]
        return [(f"layers.{i}.units.{unit}", self.t[i, unit].item(), self.held_out_t[i, unit].item()) for i, unit in places]


@torch.no_grad()
def contrast_units(
    model: Transformer,
    texts: Sequence[Text],
    others: Sequence[Text],
    *,
    at: Literal["mean", "last"] = "mean",
    seed: int = 0,
) -> UnitContrast:
    """Compare ffn.hidden, w2's input, in two sets of texts: its mean over a text's tokens, or at the last token.

    Each set needs four texts or more; `seed` selects the half that is searched. Raises RequestError.
    """
    check_part(model)
    if at not in ("mean", "last"):
        raise RequestError(f"at is {at!r:.40}, expected mean or last")
    halves = []
    for which, given in (("texts", texts), ("others", others)):
        values = _activity(model, given, at, which)
        order = torch.randperm(len(values), generator=seeded(seed), device="cpu")
        halves.append((values[order[::2]], values[order[1::2]]))
    (ours, our_rest), (theirs, their_rest) = halves
    return UnitContrast(ours.mean(0) - theirs.mean(0), _welch(ours, theirs), _welch(our_rest, their_rest))


def _activity(model: Transformer, texts: Sequence[Text], at: str, which: str) -> Tensor:
    """One number per unit for each text: (texts, n_layers, F)."""
    ids = as_texts(model, texts)
    if len(ids) < 4:
        raise RequestError(f"{which} has {len(ids)} texts, expected four or more: half of them are held out")
    out = []
    for traced in trace_each(model, ids, "layers.*.ffn.hidden"):
        values = torch.stack([value[0].float() for value in traced.values()])  # (n_layers, T, F)
        out.append((values.mean(1) if at == "mean" else values[:, -1]).cpu())
    return torch.stack(out)


def _welch(ours: Tensor, theirs: Tensor) -> Tensor:
    """Welch's t of each unit: (n, …) and (m, …) -> (…)."""
    variance = ours.var(0) / len(ours) + theirs.var(0) / len(theirs)
    return torch.where(variance > 0, (ours.mean(0) - theirs.mean(0)) / variance.sqrt(), 0)
