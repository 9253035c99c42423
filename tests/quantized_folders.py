"""Small folders in the layouts of Meta's quantized releases."""

from pathlib import Path
from typing import Any

from folders import byte_tokenizer
from llama_ref.checkpoint.meta_quantized.kinds import Kind
from make_random_checkpoint import make_random_checkpoint

SHAPE = {"dim": 64, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512, "norm_eps": 1e-5, "rope_theta": 500000.0}
SCHEME = {"scheme": "int4_weight_int8_dynamic_activation", "group_size": 32}
SPINQUANT = SHAPE | {"multiple_of": 256, "quantization_args": SCHEME | {"spinquant": True}}
QLORA = SHAPE | {"multiple_of": 64, "quantization_args": SCHEME, "lora_args": {"rank": 16, "scale": 2.0}}
# As many heads as the most shards.
WITH_FP8 = SHAPE | {"multiple_of": 64, "n_heads": 8, "n_kv_heads": 8}


def quantized_folder(path: Path, params: dict[str, Any], **options: Any) -> Path:
    """A complete folder with tokenizer and checklist; `options` are make_random_checkpoint's."""
    return make_random_checkpoint(path, params, tokenizer=byte_tokenizer(path.with_name(f"{path.name}.model")), **options)


def fp8_folder(path: Path, shards: int = 2, **options: Any) -> Path:
    return quantized_folder(path, WITH_FP8, shards=shards, kind=Kind.FP8, **options)


def int8_folder(path: Path, **options: Any) -> Path:
    return quantized_folder(path, SHAPE | {"multiple_of": 64}, kind=Kind.INT8, **options)
