"""A tiny model that reads images, with images for it and texts that contain them."""

import numpy as np
import torch
from PIL import Image

from llama_ref.args import ModelArgs
from llama_ref.vision import VisionTransformer

PARAMS = {
    "dim": 32,
    "n_layers": 4,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 512,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vision_chunk_size": 56,
    "vision_num_cross_attention_layers": 2,
    "vision_dim": 32,
    "vision_n_layers": 3,
    "vision_n_global_layers": 2,
    "vision_n_heads": 2,
    "vision_kept_layers": [1, 2],
}
ARGS = ModelArgs.from_dict(PARAMS)
IMAGE = ARGS.vocab_size  # the id of an image's place
TILE = ARGS.patches_per_tile  # 17 vision tokens: 4 × 4 patches and the class token
ALL_TILES = 4 * 24  # tokens of four tiles, each padded to a multiple of 8


def random_vision_model(args: ModelArgs = ARGS, seed: int = 0) -> VisionTransformer:
    """A model with random weights of a realistic size, and gates that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    model = VisionTransformer(args).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image of noise with this size; 100 × 50 pixels take one row of two tiles."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
