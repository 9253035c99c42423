"""The KV cache: keys and values of all tokens so far, and attention to them.

Shapes as in model.py: B sequences, T new tokens each, S tokens seen so far, H query heads, K key/value heads, hd = head_dim.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.model import Context, attend


@dataclass
class ImageKeys:
    """Keys and values of a batch's images, which the cross-attention layers read.

    `keys` and `values` are (cross layers, B, N, K, hd). A vision token is visible to the positions
    from `begins` up to, but not including, `ends`, both (B, N); padding is visible to none.
    """

    keys: Tensor
    values: Tensor
    begins: Tensor
    ends: Tensor

    def visible(self, positions: Tensor) -> Tensor:
        """Mask, True where a position (B, T) sees a vision token: bool (B, T, N)."""
        at = positions[:, :, None]
        return (self.begins[:, None] <= at) & (at < self.ends[:, None])


class KVCache:
    """Keys and values of all tokens so far, for every layer, and the length of each row.

    `keys` and `values` are (n_layers, B, K, max_seq_len, hd). `lengths` (B,) counts the tokens of each
    row; slots beyond are never read, so a row is truncated by lowering its length. `longest` is
    their maximum, a Python int that is known without waiting for the device. `images` are the
    images that the rows' tokens attend to (vision.py). `prompt_ends` are the lengths of the rows'
    prompts, once these are read, and `padded_from` the positions from which on the current pass has
    padding: no attention needs them, but who studies a pass does.
    For inference: use it under `torch.inference_mode()` or with frozen weights.
    """

    needs_mask = True  # whether attention builds a mask (T, S)

    def __init__(
        self, args: ModelArgs, batch_size: int, max_seq_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ):
        shape = (args.n_layers, batch_size, args.n_kv_heads, max_seq_len, args.head_dim)  # (16, 4, 8, 2048, 64)
        # On a CPU, uses memory only as it fills.
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.rows = torch.arange(batch_size, device=device)[:, None]  # (B, 1)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.longest = 0
        self.images: ImageKeys | None = None
        self.prompt_ends: Sequence[int] | None = None
        self.padded_from: Sequence[int] | None = None
        self._mask: tuple[Context, int, Tensor] | None = None  # of the current pass, for this many heads per group

    @property
    def max_seq_len(self) -> int:
        return self.keys.shape[3]

    def make_room(self, n_tokens: int) -> Tensor:
        """Positions (B, T) of the next `n_tokens` of every row. Raises ValueError if they do not fit."""
        end = self.longest + n_tokens
        if end > self.max_seq_len:
            raise ValueError(f"{self.longest} + {n_tokens} tokens do not fit into a cache of {self.max_seq_len}")
        self.clear_unwritten(n_tokens)
        return self.lengths[:, None] + torch.arange(n_tokens, device=self.lengths.device)

    def clear_unwritten(self, n_tokens: int) -> None:
        """Zero the next `n_tokens` slots: shorter rows do not write theirs, and a masked NaN still spreads."""
        if len(self.lengths) > 1:
            new = slice(self.longest, self.longest + n_tokens)
            self.keys[:, :, :, new] = self.values[:, :, :, new] = 0

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Store one layer's new k and v (B, T, K, hd) at `positions` (B, T)."""
        # Advanced indices separated by a slice move to the front (NumPy's rule): [(B, 1), :, (B, T)] is (B, T, K, hd).
        # Under autocast, k and v may have another dtype than the cache.
        self.keys[layer][self.rows, :, positions] = k.to(self.keys.dtype)
        self.values[layer][self.rows, :, positions] = v.to(self.values.dtype)

    def read(self, layer: int, n_tokens: int) -> tuple[Tensor, Tensor]:
        """One layer's first `n_tokens` keys and values: views (B, S, K, hd) each."""
        return self.keys[layer, :, :, :n_tokens].transpose(1, 2), self.values[layer, :, :, :n_tokens].transpose(1, 2)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Store one layer's k and v (B, T, K, hd), attend with q to all tokens: (B, T, H, hd).

        Subclasses may use another layout or kernel that suits their device.
        """
        self.write(layer, context.positions, k, v)
        if context.n_seen == context.n_new:
            return attend(q, k, v)
        k, v = (x.to(q.dtype) for x in self.read(layer, context.n_seen))  # (B, S, K, hd)
        return grouped_attention(q, k, v, self._mask_for(context, q.shape[2] // k.shape[2]))

    def _mask_for(self, context: Context, group: int) -> Tensor:
        """The mask of `grouped_attention`, built once for all layers of a pass."""
        if self._mask is None or self._mask[0] is not context or self._mask[1] != group:
            visible = context.visible
            assert visible is not None
            self._mask = context, group, group_mask(visible, group)
        return self._mask[2]

    @contextmanager
    def padding_from(self, positions: Sequence[int] | None) -> Iterator[None]:
        """In the block, tokens at these positions of the rows and beyond are padding."""
        self.padded_from = positions
        try:
            yield
        finally:
            self.padded_from = None

    def advance(self, n_tokens: int) -> None:
        self._mask = None
        self.lengths += n_tokens
        self.longest += n_tokens

    def truncate(self, lengths: list[int]) -> None:
        """Cut every row to its own length, as after a prefill of padded prompts."""
        self.lengths.copy_(torch.tensor(lengths, device="cpu"))
        self.longest = max(lengths)


def group_mask(visible: Tensor, group: int) -> Tensor:
    """`visible` (B, T, S), repeated for the G query heads of a group: bool (B, 1, G·T, S)."""
    B, T, S = visible.shape
    return visible[:, None].expand(B, group, T, S).reshape(B, 1, group * T, S)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Masked attention: q (B, T, H, hd), k and v (B, S, K, hd), mask (B, 1, G·T, S) -> (B, T, H, hd).

    The G query heads of a group become G·T queries of one head, so key heads are never copied.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T or S, hd)
    (B, H, T, hd), K = q.shape, k.shape[1]
    q = q.reshape(B, K, H // K * T, hd)  # (4, 32, 1, 64) -> (4, 8, 4, 64)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.reshape(B, H, T, hd).transpose(1, 2)
