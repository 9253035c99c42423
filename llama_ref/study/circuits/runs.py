"""Pairs of texts with their embeddings, and what each sender writes: shared by edge scores, paths and circuits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ref.model import Transformer
from llama_ref.study.analyses.attribution import matrix
from llama_ref.study.passes.layer_window import layer_window
from llama_ref.study.patching.metrics import Metric
from llama_ref.study.patching.pairs import Corrupted, as_pairs, clean_streams, corrupted_streams
from llama_ref.study.texts import Texts
from llama_ref.study.trace import Trace, trace


@dataclass(frozen=True)
class Run:
    """A clean and a corrupted text: the clean ids (T,), both embeddings (T, D); `weight` is for the mean over runs."""

    text: Tensor
    clean: Tensor
    corrupted: Tensor
    metric: Metric
    weight: float

    def trace(self, model: Transformer, share: float, names: Sequence[str], *, requires_grad: bool = False) -> Trace:
        """Trace the text with embeddings at this share of the path from corrupted (0) to clean (1)."""
        stream = torch.lerp(self.corrupted, self.clean, share)[None]
        with layer_window(model, range(model.args.n_layers), stream):
            return trace(model, self.text, names, requires_grad=requires_grad)


@torch.no_grad()
def as_runs(model: Transformer, clean: Texts, corrupted: Corrupted, metrics: Metric | Sequence[Metric]) -> list[Run]:
    """The runs of all pairs. Raises RequestError as `patch_grids` does."""
    pairs = as_pairs(model, clean, corrupted, metrics)
    ours, theirs = clean_streams(model, pairs, 1).values, iter(corrupted_streams(model, pairs, 1).values)
    return [
        Run(pair.clean, own, next(theirs), pair.metric, 1 / (pair.n_runs * len(pairs)))
        for pair, own in zip(pairs, ours, strict=True)
        for _ in range(pair.n_runs)
    ]


def written_names(model: Transformer) -> list[str]:
    """The activations from which senders' outputs are computed, without the embedding."""
    layers = range(model.args.n_layers)
    return [f"layers.{layer}.{part}" for layer in layers for part in ("attention.head_output", "ffn.output")]


def differences(model: Transformer, run: Run, clean: Trace, corrupted: Trace) -> Tensor:
    """Each sender's output in the clean run minus in the corrupted one: float32 (senders, T, D)."""
    out = [(run.clean.float() - run.corrupted.float())[None]]
    for layer in range(model.args.n_layers):
        heads, ffn = (
            clean[name][0].float() - corrupted[name][0].float()
            for name in (f"layers.{layer}.attention.head_output", f"layers.{layer}.ffn.output")
        )
        out += [head_results(model, layer, heads), ffn[None]]
    return torch.cat(out)


def head_results(model: Transformer, layer: int, head_output: Tensor) -> Tensor:
    """What each head adds to the residual stream: (T, H, hd) -> float32 (H, T, D)."""
    wo = matrix(model.get_submodule(f"layers.{layer}.attention.wo")).unflatten(1, head_output.shape[1:])  # (D, H, hd)
    return torch.einsum("the,dhe->htd", head_output.float(), wo)


def by_heads(model: Transformer, layer: int, name: str) -> Tensor:
    """A layer's wq, wk or wv, split into heads: float32 (heads, hd, D)."""
    return matrix(model.get_submodule(f"layers.{layer}.attention.{name}")).unflatten(0, (-1, model.args.head_dim))


def layer_ports(model: Transformer, layer: int) -> Iterator[tuple[str, Tensor]]:
    """Yield a layer's attention inputs (q, k, v) by activation name, with their weights by head, in the receivers' order."""
    for activation, name in (("q_unrotated", "wq"), ("k_unrotated", "wk"), ("v", "wv")):
        yield f"layers.{layer}.attention.{activation}", by_heads(model, layer, name)
