"""KV caches for CUDA: attention without masks that reads each row's length on the device.

PyTorch ships FlashAttention 2 with lengths on the device (`aten._flash_attention_forward`, `seqused_k`).
One call serves prompts, later pieces of a prompt, drafts and decode steps of ragged batches. For one
token it packs the heads of a group as rows and splits the cache over the whole card, where masked
attention would read it with a few blocks. Nothing beyond a row's length is read.
"""

from dataclasses import dataclass
from functools import cache as cached

import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.device import HOPPER, is_out_of_memory
from llama_ref.kv_cache import KVCache, group_mask, grouped_attention
from llama_ref.model import Context

# Prompt tokens per pass, over all rows: enough to keep a GPU busy.
MASKLESS_PREFILL_TOKENS = 8192
FLASH_DTYPES = (torch.bfloat16, torch.float16)
# cuDNN's attention is faster on Hopper, but plans at every new pair of lengths, up to a second (docs/cuda.md):
# use it only for whole pieces of long prompts, which are few.
CUDNN_FROM = 2 * MASKLESS_PREFILL_TOKENS  # earlier tokens


class CudaKVCache(KVCache):
    """A cache on a CUDA device; setting lengths does not wait for the device."""

    def truncate(self, lengths: list[int]) -> None:
        host = torch.tensor(lengths, device="cpu", pin_memory=self.lengths.is_cuda)
        self.lengths.copy_(host, non_blocking=True)
        self.longest = max(lengths)


class FlashKVCache(CudaKVCache):
    """A cache with `flash` attention, stored token by token: (2, n_layers, B, S, K, hd)."""

    needs_mask = False
    tries_cudnn = True

    def __init__(self, args: ModelArgs, batch_size: int, max_seq_len: int, *, dtype: torch.dtype, device: torch.device | str):
        super().__init__(args, batch_size, 0, dtype=dtype, device=device)
        shape = (2, args.n_layers, batch_size, max_seq_len, args.n_kv_heads, args.head_dim)
        self.stored = torch.empty(shape, dtype=dtype, device=device)
        self.keys, self.values = self.stored.transpose(3, 4)  # (n_layers, B, K, S, hd) each
        self._lengths: tuple[Context, FlashLengths] | None = None  # of the current pass

    def clear_unwritten(self, n_tokens: int) -> None:
        """Nothing to do: nothing beyond a row's length is read."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        self.write(layer, context.positions, k, v)
        if self._lengths is None or self._lengths[0] is not context:
            lengths = FlashLengths.from_lengths(self.lengths, context.n_new, self.max_seq_len, context.n_seen)
            self._lengths = context, lengths
        out = self.attend_piece(layer, q.to(self.keys.dtype), self._lengths[1], self.longest)
        return out.to(q.dtype)  # under autocast q may have another dtype than the cache

    def advance(self, n_tokens: int) -> None:
        super().advance(n_tokens)
        self._lengths = None  # its context has this cache: a cycle would keep both until a garbage collection

    def attend_piece(self, layer: int, q: Tensor, at: "FlashLengths", longest: int) -> Tensor:
        """Attention of new tokens' q (B, T, H, hd), their keys and values already stored: (B, T, H, hd).

        `longest`: earlier tokens of the longest row.
        """
        keys, values = self.stored[:, layer]  # (B, S, K, hd) each
        if self.tries_cudnn and is_for_cudnn(q, longest):
            try:
                return cudnn(q, keys, values, longest)
            except RuntimeError as error:  # cuDNN is missing or does not support these shapes
                if is_out_of_memory(error):
                    raise
                self.tries_cudnn = False
        return flash(q, keys, values, at)


@dataclass(frozen=True)
class FlashLengths:
    """Offsets of each row's queries and keys, and its number of keys: int32 (B + 1,), (B + 1,) and (B,).

    T new tokens per row. `width`, an upper bound of keys per row, decides how the cache is split.
    """

    query_starts: Tensor
    key_starts: Tensor
    n_keys: Tensor
    T: int
    width: int

    @classmethod
    def from_lengths(cls, lengths: Tensor, T: int, max_seq_len: int, width: int) -> "FlashLengths":
        """For rows with `lengths` (B,) tokens before the T new ones, in a cache of `max_seq_len` tokens per row."""
        steps = torch.arange(len(lengths) + 1, device=lengths.device, dtype=torch.int32)
        return cls(steps * T, steps * max_seq_len, (lengths + T).int(), T, width)


def flash(q: Tensor, keys: Tensor, values: Tensor, at: FlashLengths) -> Tensor:
    """Causal attention of q (B, T, H, hd) to a cache's keys and values (B, S, K, hd): (B, T, H, hd).

    The cache includes the new tokens. bfloat16 or float16, on NVIDIA cards since Ampere.
    """
    out = torch.ops.aten._flash_attention_forward(
        q.flatten(0, 1),
        keys.flatten(0, 1),
        values.flatten(0, 1),
        at.query_starts,
        at.key_starts,
        at.T,
        at.width,
        0.0,  # dropout
        at.T > 1,  # causal: the last query is its row's last token
        False,
        seqused_k=at.n_keys,
    )[0]
    return out.reshape(q.shape)


def is_for_cudnn(q: Tensor, longest: int) -> bool:
    """Whether queries (B, T, H, hd) after `longest` tokens are a late piece of one long prompt, on Hopper."""
    piece = MASKLESS_PREFILL_TOKENS
    return q.shape[:2] == (1, piece) and longest >= CUDNN_FROM and longest % piece == 0 and _is_hopper(q.device)


@cached
def _is_hopper(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == HOPPER


def cudnn(q: Tensor, keys: Tensor, values: Tensor, longest: int) -> Tensor:
    """As `flash`, for one row's q (1, T, H, hd) after `longest` tokens, by cuDNN.

    cuDNN aligns a causal mask with the first key, not the last. So attention to the earlier tokens and
    causal attention among the new ones are computed separately and merged by their softmax weights.
    """
    T = q.shape[1]
    parts = []
    for tokens, is_causal in ((slice(0, longest), False), (slice(longest, longest + T), True)):
        k, v = (x[0, tokens].transpose(0, 1)[None] for x in (keys, values))  # (1, K, n, hd)
        parts.append(cudnn_attention(q.transpose(1, 2), k, v, is_causal))
    (before, log_weight), (among, own_log_weight) = parts
    share = torch.sigmoid(log_weight - own_log_weight)  # (1, H, T, 1)
    return torch.lerp(among.float(), before.float(), share).to(q.dtype).transpose(1, 2)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """q (1, H, T, hd), k and v (1, K, S, hd) -> attention (1, H, T, hd) and log Σ exp of its scores (1, H, T, 1)."""
    out, log_weight, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal, False)
    return out, log_weight.view(*q.shape[:3], 1)


@cached
def has_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `flash` works here and agrees with masked attention; tried once."""
    if dtype not in FLASH_DTYPES or head_dim % 8:
        return False
    B, T, S, K, G = 2, 3, 40, 2, 4
    cpu = torch.Generator("cpu").manual_seed(0)
    q = torch.randn(B, T, K * G, head_dim, generator=cpu, device="cpu").to(device, dtype)
    keys, values = torch.randn(2, B, S, K, head_dim, generator=cpu, device="cpu").to(device, dtype)
    lengths = torch.tensor([30, 7], device=device)
    positions = lengths[:, None] + torch.arange(T, device=device)  # (B, T)
    visible = torch.arange(S, device=device) <= positions[:, :, None]  # (B, T, S)
    try:
        with torch.inference_mode():
            found = flash(q, keys, values, FlashLengths.from_lengths(lengths, T, S, S))
            expected = grouped_attention(q, keys, values, group_mask(visible, G))
            return bool((found - expected).abs().max() < 0.05)
    except (RuntimeError, TypeError):  # an older card, or another PyTorch
        return False
