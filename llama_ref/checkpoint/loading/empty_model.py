"""A model without memory for its weights, which are set later."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from llama_ref.args import ModelArgs
from llama_ref.model import Transformer
from llama_ref.vision import VisionTransformer


class _Uninitialized(TorchFunctionMode):
    """Skips initialization: `nn.init` on the meta device imports a compiler (0.8 s)."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def model_without_memory(args: ModelArgs, cross_layers: Sequence[int] | None = None) -> Transformer:
    """A model on the meta device: modules and shapes. `cross_layers`: see VisionTransformer."""
    with torch.device("meta"), _Uninitialized():
        return VisionTransformer(args, cross_layers) if args.has_vision else Transformer(args)
