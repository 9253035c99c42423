"""Meta's vision model and image transform, imported without torchvision.

`from metas_vision import model, VariableSizeImageTransform`
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


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
    """Replace the parts of torchvision that Meta's image_transform.py imports.

    torchvision itself needs a PyTorch built for it. On Pillow images, its functions give the same
    results to the bit.
    """
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    root, transforms, functional = (ModuleType(name) for name in names)
    vars(root).update(transforms=transforms)
    bilinear = SimpleNamespace(BILINEAR=Image.Resampling.BILINEAR)
    vars(transforms).update(ToTensor=_ToTensor, Normalize=_Normalize, InterpolationMode=bilinear, functional=functional)
    vars(functional).update(resize=_resize)
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(zip(names, (root, transforms, functional), strict=True))
    try:
        yield
    finally:  # only these: other modules imported in the block stay
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


with _instead_of_torchvision():
    from llama_models.llama3.multimodal import model
    from llama_models.llama3.multimodal.image_transform import VariableSizeImageTransform

__all__ = ["VariableSizeImageTransform", "model"]
