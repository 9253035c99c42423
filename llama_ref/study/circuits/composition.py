"""Composition of heads: how much of one head's output another head's queries, keys or values read.

‖W_QKᵀ·W_OV‖ / (‖W_QK‖·‖W_OV‖) for queries, ‖W_QK·W_OV‖ for keys and ‖W_OV·W_OV‖ for values, the latter two
divided by the norms of their factors as well. W_OV on the right is the writer's, and norms are Frobenius
norms. Source: Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.study.circuits.head_matrices import HeadMatrices, check_distance
from llama_ref.study.inputs import check_index
from llama_ref.study.passes.hooks import check_model

Port = Literal["q", "k", "v"]


@dataclass(frozen=True)
class Composition:
    """Scores from 0 to 1 for (reader, writer): `q`, `k` and `v`, float32 (layers, H, layers, H), on the CPU.

    `layers` has the layer numbers for both layer axes. NaN where the writer is not in a layer before the
    reader. Independent matrices score about 1/√D.
    """

    layers: list[int]
    q: Tensor
    k: Tensor
    v: Tensor

    def top(self, port: Port, n: int) -> list[tuple[str, str, float]]:
        """The n largest scores (or all, if there are fewer): reader, writer, score; names as in `attribute_edges`."""
        if port not in ("q", "k", "v"):
            raise RequestError(f"port is {port!r:.40}, expected q, k or v")
        scores: Tensor = getattr(self, port)
        order = scores.flatten().nan_to_num(-1).argsort(descending=True, stable=True)[: min(n, int((~scores.isnan()).sum()))]
        places = torch.stack(torch.unravel_index(order, scores.shape), 1).tolist()
        return [
            (self._name(reader, head), self._name(writer, other), scores[reader, head, writer, other].item())
            for reader, head, writer, other in places
        ]

    def _name(self, layer: int, head: int) -> str:
        return f"layers.{self.layers[layer]}.heads.{head}"


@torch.no_grad()
def composition(
    model: Transformer,
    layers: Sequence[int] | None = None,
    *,
    distance: int = 0,
    fold_norms: bool = True,
    progress: Progress | None = None,
) -> Composition:
    """Score every pair of heads in these layers (default: all) by their weights alone.

    `distance` is how many tokens the reader's queries come after its keys, for RoPE. With `fold_norms` the
    weights of the norms before attention are folded into the reading matrices; otherwise they are left out,
    as in the paper, whose model has none. Heads of a group share keys and values, but their scores still
    differ because of each head's queries and output. `progress` is called with the layers done and their
    number. Raises RequestError.
    """
    check_model(model)
    distance = check_distance(distance)
    H, n_layers = model.args.n_heads, model.args.n_layers
    chosen = sorted({check_index("layer", layer, n_layers) for layer in (range(n_layers) if layers is None else layers)})
    counter = ProgressCounter(len(chosen), progress)
    scores = {port: torch.full((len(chosen), H, len(chosen), H), torch.nan, device="cpu") for port in "qkv"}
    writers: list[Tensor] = []
    for i, layer in enumerate(chosen):
        heads = HeadMatrices.from_layer(model, layer, distance=distance, fold_norm=fold_norms)
        for port, reader in _readers(heads).items():
            for j, writer in enumerate(writers):
                scores[port][i, :, j] = _products(reader, writer).cpu()
        writers.append(_unit(heads.o @ _root(heads.v).transpose(1, 2)))
        counter.advance()
    return Composition(chosen, scores["q"], scores["k"], scores["v"])


def _readers(heads: HeadMatrices) -> dict[str, Tensor]:
    """Matrices (H, hd, D) whose products have the same norms as those with W_QKᵀ, W_QK or W_OV, scaled to norm 1."""
    return {
        "q": _unit(_root(heads.k) @ heads.q),
        "k": _unit(_root(heads.q) @ heads.k),
        "v": _unit(_root(heads.o.transpose(1, 2)) @ heads.v),
    }


def _root(matrix: Tensor) -> Tensor:
    """R (H, hd, hd) with RᵀR = M·Mᵀ for M (H, hd, D): ‖Mᵀ·X‖ = ‖R·X‖ for every X."""
    return torch.linalg.qr(matrix.transpose(1, 2), mode="r").R


def _unit(matrix: Tensor) -> Tensor:
    return matrix / torch.linalg.matrix_norm(matrix, keepdim=True)


def _products(reader: Tensor, writer: Tensor) -> Tensor:
    """Norms of the products of each head (H, hd, D) with each head of another layer (H, D, hd): (H, H)."""
    product = reader.flatten(0, 1) @ writer.transpose(0, 1).flatten(1)  # (H · hd, H · hd)
    H = len(reader)
    return product.view(H, -1, H, product.shape[1] // H).square().sum((1, 3)).sqrt()
