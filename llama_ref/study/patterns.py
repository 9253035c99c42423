"""Every head's attention pattern of a text, small enough to put into a page: rounded, the least shares left out, deflated."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llama_ref.model import Transformer
from llama_ref.study.attached import Pass, attached

STEPS = 254  # a share is rounded to so many parts of 1; the byte above says that it was not a number
NOT_A_NUMBER = 255
SHARES_OF_A_HEAD = 8000  # kept at most, but FEWEST of each token: some 10 kB where 500 tokens have 16 each
FEWEST = 8


@dataclass(frozen=True)
class PackedPatterns:
    """Where every head looks, of each of `n_tokens` that look the `kept` largest shares; the others are 0 here.

    `heads[layer][head]` is a zlib stream of two matrices, a row for each looking token: uint16 (T, kept), little-endian, how
    many keys on from the last one kept the next is; then uint8 (T, kept), its share in 254ths, 255 for NaN.
    """

    n_tokens: int
    kept: int
    heads: list[list[bytes]]

    def unpack(self, layer: int, head: int) -> Tensor:
        """float32 (T, T), as `attention_pattern` has it but for what was left out and rounded."""
        raw, n = zlib.decompress(self.heads[layer][head]), self.n_tokens * self.kept
        gaps = np.frombuffer(raw, "<u2", count=n).reshape(-1, self.kept)
        steps = torch.from_numpy(np.frombuffer(raw, "u1", offset=2 * n).reshape(-1, self.kept).copy())
        shares = torch.where(steps == NOT_A_NUMBER, torch.nan, steps / STEPS)
        keys = torch.from_numpy(gaps.astype("i8")).cumsum(-1)
        return torch.zeros(self.n_tokens, self.n_tokens).scatter_(-1, keys, shares)


def how_many_kept(n_tokens: int) -> int:
    """All of a short text's shares, some of each token's in a long one, so that a head's size grows no faster than the text."""
    return min(n_tokens, max(FEWEST, SHARES_OF_A_HEAD // n_tokens))


def pack(pattern: Tensor, kept: int) -> list[bytes]:
    """(H, T, T) -> H streams; see PackedPatterns."""
    keys = pattern.topk(kept, dim=-1).indices.sort(dim=-1).values  # (H, T, kept)
    gaps = keys.diff(dim=-1, prepend=torch.zeros_like(keys[..., :1])).cpu().numpy().astype("<u2")
    shares = pattern.gather(-1, keys).mul(STEPS).round()
    steps = shares.nan_to_num(nan=NOT_A_NUMBER).to(torch.uint8).cpu().numpy()
    return [zlib.compress(gaps[head].tobytes() + steps[head].tobytes()) for head in range(len(steps))]


def watch_patterns(model: Transformer, row: Tensor, see: Callable[[Tensor], None]) -> None:
    """Run ids (1, T) once and show each layer's patterns, float32 (H, T, T), in turn: no more than one layer's are held."""
    with torch.no_grad(), attached(model, _Watch(see)):
        model.hidden(row)


class _Watch:
    """A visitor that keeps nothing."""

    edits = in_path = False

    def __init__(self, see: Callable[[Tensor], None]):
        self.see = see

    def wants(self, name: str) -> bool:
        return name.endswith(".attention.pattern")

    def begin(self, run: Pass) -> None:
        pass

    def visit(self, name: str, value: Tensor, run: Pass) -> Tensor:
        self.see(value[0])
        return value
