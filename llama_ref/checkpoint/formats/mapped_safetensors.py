"""A safetensors file's tensors, mapped: none of their bytes are read before they are used."""

import math
from pathlib import Path

import torch
from torch import Tensor

from llama_ref.checkpoint.formats.safetensors import HeldTensor, inspect_safetensors
from llama_ref.checkpoint.mapped_file import map_file
from llama_ref.checkpoint.shapes import is_ignored
from llama_ref.errors import CheckpointError


def map_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors by name. Raises CheckpointError for a file that is no safetensors file, is cut short or contradicts itself.

    Mapped here and not by the library, which does not promise to map: only mapped bytes may be let go of again.
    """
    tensors = inspect_safetensors(path)
    try:
        data = torch.frombuffer(map_file(path), dtype=torch.uint8)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be mapped ({error})") from error
    return {name: _tensor(path, name, data, held) for name, held in tensors.items() if not is_ignored(name)}


def _tensor(path: Path, name: str, data: Tensor, held: HeldTensor) -> Tensor:
    dtype = getattr(torch, held.dtype, None)  # the newest names are not in every torch
    if dtype is None or math.prod(held.shape) * dtype.itemsize != held.nbytes:  # some dtypes pack two numbers in a byte
        raise CheckpointError(f"{path}: {name} is {held.dtype}, which is not read here; fetch weights in bfloat16")
    if not held.nbytes:
        return torch.empty(held.shape, dtype=dtype)
    flat = data[held.file_offset : held.file_offset + held.nbytes]
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()  # a header of odd length, as no writer of today makes it
    return flat.view(dtype).view(held.shape)
