"""The names, shapes and dtypes of a text model's tensors, and which releases have others."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llama_ref.args import ModelArgs
from llama_ref.formatting import dtype_name
from llama_ref.model import Transformer
from llama_ref.parallel.sharding import split_dim

Shape = tuple[int, ...]
DtypeAndShape = tuple[str, Shape]

# Older files hold RoPE's frequencies, Meta's once and Hugging Face's in every layer. params.json
# implies them.
IGNORED = re.compile(r"rope\.freqs|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
WEIGHT_DTYPES = ("bfloat16", "float16", "float32")


def other_kind(args: ModelArgs, folder: Path | None = None) -> str | None:
    """The kind of a release that is not a text model in bf16, and how that is known; else None.

    An fp8 release is recognized only by its files, in `folder`.
    """
    if args.quantization_args is not None:
        return "an int4 release (quantization_args in params.json)"
    if args.lora_args is not None:
        return "an int4 release (lora_args in params.json)"
    if args.vision_chunk_size is not None or args.vision_num_cross_attention_layers is not None:
        return "a vision release (vision keys in params.json)"
    if folder is not None and any(folder.glob("fp8_scales*")):
        return "an fp8 release (fp8_scales files)"
    return None


class _Uninitialized(TorchFunctionMode):
    """Skip torch.nn.init: on the meta device it imports a compiler, which takes 0.8 s."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def model_without_memory(args: ModelArgs) -> Transformer:
    """A model on the meta device: modules and shapes, without weights."""
    with torch.device("meta"), _Uninitialized():
        return Transformer(args)


def expected_shapes(args: ModelArgs) -> dict[str, Shape]:
    """The shapes of a model's whole tensors by name, in the model's order."""
    model = model_without_memory(replace(args, n_layers=1))  # fast; all layers are alike
    shapes = ((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
    out: dict[str, Shape] = {}
    for is_layer, group in groupby(shapes, lambda item: item[0].startswith("layers.0.")):
        named = list(group)
        for layer in range(args.n_layers if is_layer else 1):
            out |= {name.replace("layers.0.", f"layers.{layer}.", 1): shape for name, shape in named}
    return out


def shard_shape(name: str, whole: Shape, n_shards: int) -> Shape:
    """The shape of one shard's part of a tensor."""
    dim = split_dim(name)
    return tuple(size // n_shards if axis == dim else size for axis, size in enumerate(whole))


def misfits(
    shards: Mapping[str, Mapping[str, DtypeAndShape]], expected: Mapping[str, Shape], n_shards: int
) -> dict[str, list[str]]:
    """For each shard, the `expected` tensors that are missing or have the wrong shape or dtype.

    `shards` holds each tensor's dtype name and shape. If no shard has an output, it is tied.
    """
    if not any("output.weight" in tensors for tensors in shards.values()):
        expected = {name: shape for name, shape in expected.items() if name != "output.weight"}
    parts = {name: shard_shape(name, whole, n_shards) for name, whole in expected.items()}
    return {
        shard: [problem for name, part in parts.items() if (problem := misfit(name, tensors.get(name), part))]
        for shard, tensors in shards.items()
    }


def misfit(name: str, found: DtypeAndShape | None, shape: Shape, dtypes: Sequence[str] = WEIGHT_DTYPES) -> str | None:
    """The problem of a tensor that is missing or has the wrong shape or dtype; else None."""
    if found is None:
        return f"{name} is missing, expected shape {shape}"
    dtype, found_shape = found
    if found_shape != shape:
        return f"{name} has shape {found_shape}, expected {shape}"
    if dtype not in dtypes:
        expected = " or ".join(", ".join(dtypes).rsplit(", ", 1))
        return f"{name} is {dtype}, expected {expected}"
    return None


def dtypes_and_shapes(tensors: Mapping[str, Tensor]) -> dict[str, DtypeAndShape]:
    """The dtype names and shapes of tensors, as `misfits` takes them."""
    return {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}


def is_ignored(name: str) -> bool:
    """Whether this tensor may be in the files although no model needs it."""
    return IGNORED.fullmatch(name) is not None


def strangers(tensors: Iterable[str], expected: Collection[str]) -> list[str]:
    """The names of tensors that are not part of the model."""
    return [name for name in tensors if name not in expected and not is_ignored(name)]
