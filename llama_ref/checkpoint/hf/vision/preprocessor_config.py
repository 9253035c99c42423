"""Hugging Face's `preprocessor_config.json`: how images become tiles (images.py)."""

from typing import Any

from llama_ref.args import ModelArgs
from llama_ref.images import MEAN, STD

BILINEAR = 2  # Pillow's id of the filter


def make_preprocessor_config(args: ModelArgs) -> dict[str, Any]:
    """The content of the file, which transformers' AutoProcessor needs to open a vision model."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(MEAN),
        "image_processor_type": "MllamaImageProcessor",
        "image_std": list(STD),
        "max_image_tiles": args.vision_max_num_chunks,
        "processor_class": "MllamaProcessor",
        "resample": BILINEAR,
        "rescale_factor": 1 / 255,
        "size": {"height": args.vision_chunk_size, "width": args.vision_chunk_size},
    }
