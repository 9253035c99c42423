"""Choose the KV cache that suits a device."""

import torch

from llama_ref.args import ModelArgs
from llama_ref.compiled.cpu_cache import CACHE_BLOCK, FEWEST_BLOCKS, BlockKVCache
from llama_ref.compiled.cuda_cache import CudaKVCache, FlashKVCache, has_flash
from llama_ref.device import is_out_of_memory
from llama_ref.errors import RequestError
from llama_ref.kv_cache import KVCache
from llama_ref.model import Transformer

CUDA_CACHE_BLOCK = 1024  # coarse: graphs are captured for addresses, which caches of one size share (cuda.py)


def new_cache(model: Transformer, batch_size: int, n_tokens: int) -> KVCache:
    """An empty cache for `batch_size` rows of up to `n_tokens` tokens, in the model's dtype and on its device.

    Raises RequestError when there is not enough memory.
    """
    try:
        kind = kv_cache_class(model.device, model.dtype, model.args)
        block = CUDA_CACHE_BLOCK if model.device.type == "cuda" and batch_size == 1 else CACHE_BLOCK
        room = -(-n_tokens // block) * block
        if kind is BlockKVCache and batch_size == 1:
            # One block more than is read: reading all of them would compile the step again.
            room = max(room, FEWEST_BLOCKS * CACHE_BLOCK) + CACHE_BLOCK
        return kind(model.args, batch_size, room, dtype=model.dtype, device=model.device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RequestError(
            f"not enough memory for the keys and values of {batch_size} × {n_tokens:,} tokens: use a smaller "
            "max_seq_len or max_gen_len, or fewer prompts at once"
        ) from error


def kv_cache_class(device: torch.device, dtype: torch.dtype, args: ModelArgs) -> type[KVCache]:
    """The cache with the fastest attention for a device, dtype and head size."""
    if device.type == "cpu":
        return BlockKVCache
    if device.type != "cuda" or not torch.cuda.is_available():
        return KVCache
    return FlashKVCache if has_flash(device, dtype, args.head_dim) else CudaKVCache
