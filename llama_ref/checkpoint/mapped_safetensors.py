"""A safetensors file's tensors, mapped: none of their bytes are read before they are used."""

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama_ref.errors import CheckpointError
from llama_ref.files import refuse_impostor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def map_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors by name. Raises CheckpointError for a file that is no safetensors file, is cut short or contradicts itself.

    The library checks the header against the file; the places are then taken from it here, because only mapped bytes may be
    let go of again, and the library does not promise to map.
    """
    refuse_impostor(path, "a safetensors file")
    try:
        with safe_open(path, "pt"):
            pass
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
        storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    except (SafetensorError, ValueError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}); fetch it again") from error
    header.pop("__metadata__", None)
    data = torch.empty(0, dtype=torch.uint8).set_(storage)[8 + header_bytes :]
    return {name: _tensor(path, name, data, **entry) for name, entry in header.items()}


def _tensor(path: Path, name: str, data: Tensor, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} is {dtype}, which is not read here; fetch weights in bfloat16")
    flat = data[slice(*data_offsets)]
    if flat.data_ptr() % DTYPES[dtype].itemsize:
        flat = flat.clone()  # a header of odd length, as no writer of today makes it
    return flat.view(DTYPES[dtype]).view(shape) if math.prod(shape) else torch.empty(shape, dtype=DTYPES[dtype])
