"""Control vectors as GGUF files, which llama.cpp and repeng read and write. Needs the package gguf.

A tensor `direction.N` is added to the residual stream after layer N, counted from 0; llama.cpp adds
none after layer 0. The architecture is `controlvector`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_ref.errors import CheckpointError, RequestError
from llama_ref.numbers import is_whole
from llama_ref.study.directions.extraction import check_direction

ARCHITECTURE = "controlvector"
PREFIX = "direction."
LIMIT_BYTES = 1 << 30


def write_control_vector(path: str | Path, directions: Mapping[int, Tensor], model_hint: str = "llama") -> None:
    """Write {layer: (D,)}, for `llama-cli --control-vector`. Raises RequestError for layer 0 or an invalid direction."""
    gguf = _gguf()
    if not isinstance(directions, Mapping) or not directions:
        raise RequestError(f"directions is {directions!r:.40}, expected one for each layer, such as {{12: direction}}")
    for layer in directions:
        if not is_whole(layer) or layer < 1:
            raise RequestError(f"directions has layer {layer!r:.40}, expected 1 or above: llama.cpp adds none after layer 0")
    first = next(iter(directions.values()))
    dim = first.numel() if isinstance(first, Tensor) else 0
    rows = {layer: check_direction(each, dim).cpu().numpy() for layer, each in sorted(directions.items())}
    try:
        writer = gguf.GGUFWriter(path, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(rows))
        for layer, row in rows.items():
            writer.add_tensor(f"{PREFIX}{layer}", np.ascontiguousarray(row))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror or error}") from error


def read_control_vector(path: str | Path) -> dict[int, Tensor]:
    """Read {layer: float32 (D,)}. Raises CheckpointError for a file that is not a control vector."""
    gguf = _gguf()
    try:
        if Path(path).stat().st_size > LIMIT_BYTES:
            raise CheckpointError(f"{path} is larger than {LIMIT_BYTES:,} bytes: it is not a control vector")
        tensors = gguf.GGUFReader(path).tensors
        found = {_layer(path, each.name): torch.from_numpy(np.array(each.data, dtype=np.float32)) for each in tensors}
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path} is damaged, or not a GGUF file: {error}") from error
    if not found or len({each.shape for each in found.values()}) != 1 or next(iter(found.values())).dim() != 1:
        raise CheckpointError(f"{path} is not a control vector, expected tensors {PREFIX}1, {PREFIX}2, … of one length")
    return dict(sorted(found.items()))


def _layer(path: str | Path, name: str) -> int:
    number = name.removeprefix(PREFIX)
    if not name.startswith(PREFIX) or not (number.isascii() and number.isdigit()):
        raise CheckpointError(f"{path} is not a control vector: it has a tensor {name!r:.60}, expected names such as {PREFIX}1")
    return int(number)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise RequestError("control vectors need the package gguf: pip install gguf") from error
    return gguf
