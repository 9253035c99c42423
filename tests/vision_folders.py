"""Small folders in the layout of Llama 3.2 vision, and images to look at."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from folders import byte_tokenizer
from make_random_checkpoint import make_random_checkpoint

PARAMS = {
    "dim": 64,
    "n_layers": 6,
    "n_heads": 8,
    "n_kv_heads": 8,  # as many as the most shards
    "vocab_size": 512,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 32,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "vision_chunk_size": 56,
    "vision_max_num_chunks": 4,
    "vision_num_cross_attention_layers": 4,  # before layers 1, 3 and 5
    "vision_dim": 128,
    "vision_n_layers": 6,
    "vision_n_global_layers": 2,
    "vision_kept_layers": [1, 3, 4],
}
# As in Meta's code, except for the width.
METAS = PARAMS | {"vision_n_layers": 32, "vision_n_global_layers": 8, "vision_kept_layers": [3, 7, 15, 23, 30]}
IMAGE_ID = 512


def vision_folder(path: Path, params: dict[str, Any] = PARAMS, **options: Any) -> Path:
    """A complete folder with tokenizer and checklist; `options` are make_random_checkpoint's."""
    return make_random_checkpoint(path, params, tokenizer=byte_tokenizer(path.with_name(f"{path.name}.model")), **options)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB image of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
