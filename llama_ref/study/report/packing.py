"""Every head's attention pattern of a text, small enough to put into a page: rounded, the least shares left out, deflated."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llama_ref.model import Transformer
from llama_ref.study.hooks import Pass, attached

SHARES_OF_A_HEAD = 5500  # kept at most, but FEWEST of each token: some 15 kB where 500 tokens have 11 each
FEWEST = 8


@dataclass(frozen=True)
class PackedPatterns:
    """Where every head looks, of each of `n_tokens` that look the `kept` largest shares; the others are 0 here.

    `heads[layer][head]` is a zlib stream of two matrices (T, kept), a row for each looking token: as uint16, how many keys on
    from the last one kept the next is; then as float16, its share, of which three digits hold down to 6·10⁻⁵ and one down to
    10⁻⁶. Of each matrix come all low bytes and then all high bytes, which are alike and deflate well.
    """

    n_tokens: int
    kept: int
    heads: list[list[bytes]]

    def unpack(self, layer: int, head: int) -> Tensor:
        """float32 (T, T), as `attention_pattern` has it but for what was left out and rounded."""
        raw = np.frombuffer(zlib.decompress(self.heads[layer][head]), "u1").reshape(2, 2, -1)  # matrix, byte, T * kept
        gaps, shares = np.ascontiguousarray(raw.swapaxes(1, 2)).view("<u2").reshape(2, self.n_tokens, self.kept)
        keys = torch.from_numpy(gaps.astype("i8")).cumsum(-1)
        return torch.zeros(self.n_tokens, self.n_tokens).scatter_(-1, keys, torch.from_numpy(shares.view("<f2").astype("f4")))


def how_many_kept(n_tokens: int) -> int:
    """All of a short text's shares, some of each token's in a long one, so that a head's size grows no faster than the text."""
    return min(n_tokens, max(FEWEST, SHARES_OF_A_HEAD // n_tokens))


def pack(pattern: Tensor, kept: int) -> list[bytes]:
    """(H, T, T) -> H streams; see PackedPatterns."""
    keys = pattern.topk(kept, dim=-1).indices.sort(dim=-1).values  # (H, T, kept)
    gaps = keys.diff(dim=-1, prepend=torch.zeros_like(keys[..., :1])).cpu().numpy().astype("<u2")
    shares = pattern.gather(-1, keys).cpu().numpy().astype("<f2")
    return [zlib.compress(_planes(gaps[head]) + _planes(shares[head])) for head in range(len(shares))]


def _planes(matrix: np.ndarray) -> bytes:
    """The low bytes of numbers of two bytes, then the high ones."""
    return matrix.view("u1").reshape(-1, 2).T.tobytes()


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
