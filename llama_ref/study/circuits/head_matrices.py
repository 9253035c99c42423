"""The low-rank matrices of a head: what its queries, keys and values read, and what it writes.

W_QK = (R·W_q)ᵀ·W_k, with R the rotation between a query and a key some tokens before it, and
W_OV = W_o·W_v are (D, D), but of rank hd at most: they are never computed. Query heads of a group share W_k
and W_v.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llama_ref.errors import RequestError
from llama_ref.model import Transformer, rope_frequencies, rope_rotations, rotate
from llama_ref.numbers import is_whole
from llama_ref.study.analyses.attribution import matrix
from llama_ref.study.circuits.runs import by_heads


@dataclass(frozen=True)
class HeadMatrices:
    """The matrices of all query heads of a layer: q, k and v (H, hd, D), o (H, D, hd); float32, on the model's device.

    q is rotated by `distance` tokens. With `fold_norm`, q, k and v include the weight of the norm before
    attention.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor

    @classmethod
    def from_layer(cls, model: Transformer, layer: int, *, distance: int = 0, fold_norm: bool = True) -> "HeadMatrices":
        block, args = model.layers[layer], model.args
        q, k, v = (by_heads(model, layer, name) for name in ("wq", "wk", "wv"))
        o = matrix(model.get_submodule(f"layers.{layer}.attention.wo")).unflatten(1, (-1, args.head_dim)).transpose(0, 1)
        if fold_norm:
            weight = block.attention_norm.weight.float()
            q, k, v = q * weight, k * weight, v * weight
        k, v = (shared.repeat_interleave(args.n_heads // args.n_kv_heads, 0) for shared in (k, v))
        return cls(turned(model, q, distance), k, v, o)


def turned(model: Transformer, q: Tensor, distance: int) -> Tensor:
    """Rotate queries (…, hd, n) by `distance` tokens, so that keys at that distance before them need no rotation."""
    at = torch.tensor([[distance]], device=q.device)
    rotations = rope_rotations(at, rope_frequencies(model.args, q.device))
    rows = q.transpose(-1, -2).reshape(1, 1, -1, model.args.head_dim)
    return rotate(rows, *rotations).view_as(q.transpose(-1, -2)).transpose(-1, -2)


def check_distance(distance: int) -> int:
    """Return the distance. Raises RequestError unless it is a whole number from 0."""
    if not is_whole(distance) or distance < 0:
        raise RequestError(f"distance is {distance!r:.40}, expected how many tokens a query comes after its key, from 0")
    return int(distance)


def vocabulary_rows(module: nn.Module, rows: slice) -> Tensor:
    """Some rows of an embedding or output matrix: float32 (n, D); only these are converted unless it is quantized."""
    if isinstance(getattr(module, "weight", None), Tensor):
        return module.get_parameter("weight").detach()[rows].float()
    return matrix(module)[rows]
