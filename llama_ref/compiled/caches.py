"""Which KV cache suits a device."""

from llama_ref.compiled.cuda_cache import kv_cache_class
from llama_ref.device import is_out_of_memory
from llama_ref.errors import RequestError
from llama_ref.kv_cache import KVCache
from llama_ref.model import Transformer

CACHE_BLOCK = 64  # tokens; a cache holds whole blocks, by which the compiled step of a CPU reads it (cpu.py)
CUDA_CACHE_BLOCK = 1024  # coarser: captured graphs belong to addresses, which caches of one size share (cuda.py)


def new_cache(model: Transformer, batch_size: int, n_tokens: int) -> KVCache:
    """An empty cache for `batch_size` rows of up to `n_tokens` tokens, in the model's dtype and on its device.

    Raises RequestError when there is not the memory for it.
    """
    norm = model.layers[0].attention_norm.weight  # a norm is there in every part of a model, and is never quantized
    try:
        kind = kv_cache_class(norm.device, norm.dtype, model.args)
        block = CUDA_CACHE_BLOCK if norm.device.type == "cuda" and batch_size == 1 else CACHE_BLOCK
        room = -(-n_tokens // block) * block
        return kind(model.args, batch_size, room, dtype=norm.dtype, device=norm.device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RequestError(
            f"no memory for the keys and values of {batch_size} × {n_tokens:,} tokens: ask for a smaller max_seq_len or "
            "max_gen_len, or fewer prompts at once"
        ) from error
