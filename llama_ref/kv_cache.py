"""The KV cache: what all tokens so far left for those that come.

Shapes as in model.py: B sequences, T new tokens each, S tokens seen so far, H query heads, K key/value heads, hd = head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.model import Context, attend


class KVCache:
    """Keys and values of all tokens seen so far, for every layer, and how far each sequence has come.

    `keys` and `values` are (n_layers, B, K, max_seq_len, hd). `lengths` (B,) counts the tokens that stand in each row; what
    lies beyond is never looked at, so a row is cut back by lowering its length. `longest` is their maximum, known without
    asking the device. For inference: use it under `torch.inference_mode()` or with frozen weights.
    """

    needs_mask = True  # whether its attention makes a mask of new tokens times all tokens

    def __init__(
        self, args: ModelArgs, batch_size: int, max_seq_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ):
        shape = (args.n_layers, batch_size, args.n_kv_heads, max_seq_len, args.head_dim)  # (16, 4, 8, 2048, 64)
        self.keys = torch.empty(shape, dtype=dtype, device=device)  # takes memory only as it fills
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.rows = torch.arange(batch_size, device=device)[:, None]  # (B, 1)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.longest = 0
        self._made: tuple[Context, Tensor] | None = None  # the mask of the pass under way

    @property
    def max_seq_len(self) -> int:
        return self.keys.shape[3]

    def make_room(self, n_tokens: int) -> Tensor:
        """Positions (B, T) of the next `n_tokens` of every row. Raises ValueError when they do not fit."""
        end = self.longest + n_tokens
        if end > self.max_seq_len:
            raise ValueError(f"{self.longest} + {n_tokens} tokens do not fit into a cache of {self.max_seq_len}")
        self.clear_unwritten(n_tokens)
        return self.lengths[:, None] + torch.arange(n_tokens, device=self.lengths.device)

    def clear_unwritten(self, n_tokens: int) -> None:
        """Clear the next `n_tokens` places: shorter rows leave theirs unwritten, and a NaN counts even where it is masked."""
        if len(self.lengths) > 1:
            new = slice(self.longest, self.longest + n_tokens)
            self.keys[:, :, :, new] = self.values[:, :, :, new] = 0

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Store one layer's new k and v (B, T, K, hd) at `positions` (B, T)."""
        # Advanced indices separated by a slice move to the front (NumPy's rule): [(B, 1), :, (B, T)] is (B, T, K, hd).
        self.keys[layer][self.rows, :, positions] = k
        self.values[layer][self.rows, :, positions] = v

    def read(self, layer: int, n_tokens: int) -> tuple[Tensor, Tensor]:
        """One layer's first `n_tokens` keys and values: views (B, S, K, hd) each."""
        return self.keys[layer, :, :, :n_tokens].transpose(1, 2), self.values[layer, :, :, :n_tokens].transpose(1, 2)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Store one layer's new k and v (B, T, K, hd), then attention of q (B, T, H, hd) to all so far: (B, T, H, hd).

        A subclass may store and attend another way, as its device does best.
        """
        self.write(layer, context.positions, k, v)
        if context.n_seen == context.n_new:
            return attend(q, k, v)
        k, v = self.read(layer, context.n_seen)  # (B, S, K, hd)
        return grouped_attention(q, k, v, self._mask(context, q.shape[2] // k.shape[2]))

    def _mask(self, context: Context, group: int) -> Tensor:
        """`grouped_attention`'s mask, made once for all layers of a pass."""
        if self._made is None or self._made[0] is not context:
            visible = context.visible
            assert visible is not None
            self._made = context, group_mask(visible, group)
        return self._made[1]

    def advance(self, n_tokens: int) -> None:
        self._made = None
        self.lengths += n_tokens
        self.longest += n_tokens

    def set_lengths(self, lengths: list[int]) -> None:
        """Cut every row back to its own length, as after a prefill of padded prompts."""
        self.lengths.copy_(torch.tensor(lengths))
        self.longest = max(lengths)


def group_mask(visible: Tensor, group: int) -> Tensor:
    """`visible` (B, T, S) for the G heads of a group that queue up as G·T queries: bool (B, 1, G·T, S)."""
    B, T, S = visible.shape
    return visible[:, None].expand(B, group, T, S).reshape(B, 1, group * T, S)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Masked attention: q (B, T, H, hd), k and v (B, S, K, hd), mask (B, 1, G·T, S) -> (B, T, H, hd).

    Key heads are never copied for the query heads that share them: the G heads of a group queue up as G·T queries of one head.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T or S, hd)
    (B, H, T, hd), K = q.shape, k.shape[1]
    q = q.reshape(B, K, H // K * T, hd)  # (4, 32, 1, 64) -> (4, 8, 4, 64)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.reshape(B, H, T, hd).transpose(1, 2)
