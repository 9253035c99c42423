"""Compress attention patterns for the report: keep the largest weights, round them, deflate."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llama_ref.model import Transformer
from llama_ref.study.passes.hooks import Pass, attached
from llama_ref.study.texts import Batch
from llama_ref.study.vision.images import Images

KEPT_PER_HEAD = 5500  # about 15 kB; 500 tokens have 11 each
FEWEST = 8  # weights kept per token even in long texts


@dataclass(frozen=True)
class PackedPatterns:
    """Attention patterns of all heads, compressed: each query's `kept` largest weights.

    `heads[layer][head]` is a zlib stream of two matrices (T, kept), a row per query: the distance
    of each kept key from the previous kept key, as uint16, then the weights as float16, with three correct
    digits down to 6·10⁻⁵ and one digit down to 10⁻⁶. Each matrix is stored as all low bytes, then all
    high bytes: similar bytes deflate well.
    """

    n_tokens: int
    kept: int
    heads: list[list[bytes]]

    def unpack(self, layer: int, head: int) -> Tensor:
        """One head's pattern, float32 (T, T), rounded and without the small weights."""
        raw = np.frombuffer(zlib.decompress(self.heads[layer][head]), "u1").reshape(2, 2, -1)  # matrix, byte, T * kept
        gaps, shares = np.ascontiguousarray(raw.swapaxes(1, 2)).view("<u2").reshape(2, self.n_tokens, self.kept)
        keys = torch.from_numpy(gaps.astype("i8")).cumsum(-1)
        return torch.zeros(self.n_tokens, self.n_tokens, device="cpu").scatter_(
            -1, keys, torch.from_numpy(shares.view("<f2").astype("f4"))
        )


def how_many_kept(n_tokens: int) -> int:
    """Number of weights to keep per query: fewer in a long text, so that size grows linearly."""
    return min(n_tokens, max(FEWEST, KEPT_PER_HEAD // n_tokens))


def pack(pattern: Tensor, kept: int) -> list[bytes]:
    """Compress one layer's patterns, (H, T, T) -> H streams; see PackedPatterns."""
    keys = pattern.topk(kept, dim=-1).indices.sort(dim=-1).values  # (H, T, kept)
    gaps = keys.diff(dim=-1, prepend=torch.zeros_like(keys[..., :1])).cpu().numpy().astype("<u2")
    shares = pattern.gather(-1, keys).cpu().numpy().astype("<f2")
    return [zlib.compress(_planes(gaps[head]) + _planes(shares[head])) for head in range(len(shares))]


def _planes(matrix: np.ndarray) -> bytes:
    """All low bytes of 16-bit numbers, then all high bytes."""
    return matrix.view("u1").reshape(-1, 2).T.tobytes()


def watch_patterns(
    model: Transformer,
    row: Tensor,
    see: Callable[[Tensor], None],
    images: Images | None = None,
    *,
    layers: Literal["layers", "cross_layers"] = "layers",
) -> None:
    """Run ids (1, T) and call `see` with each layer's patterns in turn.

    Patterns are float32 (H, T, T); in cross-attention layers (H, T, vision tokens).
    """
    with torch.no_grad(), attached(model, _Watch(see, layers)):
        Batch.from_texts(model, list(row.cpu()), images).show(model)


class _Watch:
    """A visitor that passes patterns on and keeps nothing."""

    edits = in_path = False

    def __init__(self, see: Callable[[Tensor], None], layers: str):
        self.see, self.layers = see, layers

    def wants(self, name: str) -> bool:
        return name.startswith(f"{self.layers}.") and name.endswith(".attention.pattern")

    def begin(self, run: Pass) -> None:
        pass

    def visit(self, name: str, value: Tensor, run: Pass | None) -> Tensor:
        self.see(value[0])
        return value
