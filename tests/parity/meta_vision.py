"""Meta's own vision model and image transform, on a CPU."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from fairscale.nn.model_parallel.layers import ColumnParallelLinear
from llama_models.llama3.args import ModelArgs as MetaArgs
from llama_models.llama3.chat_format import create_vision_mask
from PIL import Image
from torch import Tensor

from llama_ref.checkpoint.shapes import name_in_shards
from llama_ref.vision import VisionTransformer


class _ToTensor:
    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.get_default_dtype()).div(255)


class _Normalize:
    def __init__(self, mean: Sequence[float], std: Sequence[float], inplace: bool):
        self.mean, self.std = mean, std

    def __call__(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(values, dtype=x.dtype)[:, None, None] for values in (self.mean, self.std))
        return x.sub_(mean).div_(std)


def _resize(image: Image.Image, size: tuple[int, int], interpolation: Any) -> Image.Image:
    height, width = size
    return image if image.size == (width, height) else image.resize((width, height), interpolation)


@contextlib.contextmanager
def _instead_of_torchvision() -> Iterator[None]:
    """What Meta's image_transform.py imports of torchvision, which needs a PyTorch built for it.

    Its functions on Pillow images do what these lines do, to the bit.
    """
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    root, transforms, functional = (ModuleType(name) for name in names)
    vars(root).update(transforms=transforms)
    bilinear = mock.Mock(BILINEAR=Image.Resampling.BILINEAR)
    vars(transforms).update(ToTensor=_ToTensor, Normalize=_Normalize, InterpolationMode=bilinear, functional=functional)
    vars(functional).update(resize=_resize)
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(zip(names, (root, transforms, functional), strict=True))
    try:
        yield
    finally:  # these alone: what was imported meanwhile stays
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


with _instead_of_torchvision():
    from llama_models.llama3.multimodal import model as metas
    from llama_models.llama3.multimodal.image_transform import VariableSizeImageTransform


def metas_tiles(image: Image.Image, tile: int, most_tiles: int) -> tuple[Tensor, tuple[int, int]]:
    """Pixels (n, 3, S, S) and grid by Meta's transform."""
    return VariableSizeImageTransform(size=tile)(image, max_num_chunks=most_tiles)


class MetasVisionModel:
    """Meta's model on the weights of ours, whose encoder has any width but Meta's depth."""

    def __init__(self, model: VisionTransformer, max_seq_len: int, max_batch_size: int):
        args = model.args
        same = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps")
        vision = ("vision_chunk_size", "vision_max_num_chunks", "vision_num_cross_attention_layers")
        given = {name: getattr(args, name) for name in (*same, *vision, "rope_theta", "use_scaled_rope")}
        with mock.patch.object(metas, "VisionEncoder", partial(metas.VisionEncoder, width=args.vision_dim)):
            self.model = metas.CrossAttentionTransformer(
                MetaArgs(**given, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
            )
        projection = ColumnParallelLinear(6 * args.vision_dim, args.dim, bias=True, init_method=lambda x: x)
        self.model.vision_model.vision_projection = projection
        self.model.load_state_dict({name_in_shards(name, args): tensor for name, tensor in model.state_dict().items()})
        self.model.setup_cache(max_batch_size, torch.device("cpu"), torch.float32)
        self.args, self.image_id = args, model.image_id

    @torch.inference_mode()
    def encoded(self, image: Image.Image) -> Tensor:
        """The encoder's output for all tiles of an image: (4, P, 6 · W)."""
        size = self.args.vision_chunk_size
        pixels, grid = metas_tiles(image, size, self.args.vision_max_num_chunks)
        stacked, _ = metas._stack_images([[pixels]], self.args.vision_max_num_chunks, size, 1)
        return self.model.vision_model.vision_encoder(stacked, torch.tensor([[list(grid)]]))[0, 0]

    @torch.inference_mode()
    def logits(self, rows: list[list[int]], images: list[list[Image.Image]], spans: list[list[list[int]]]) -> Tensor:
        """Of ids (B, T), each row of the same length, in one pass: (B, T, V). `spans`: see `metas_spans`."""
        total = len(rows[0])
        keys, mask, rows_mask = self.model.compute_vision_tokens_masks(
            images, [[list(span) for span in row] for row in spans], total, torch.device("cpu")
        )
        positions = torch.arange(total)
        return self.model(positions, torch.tensor(rows), mask, rows_mask, keys, text_only_inference=not any(images))


def metas_spans(prompt: list[int], image_id: int) -> list[list[int]]:
    """From where to before where a prompt's images are seen; -1: to the end of all."""
    return create_vision_mask(prompt, image_id)
