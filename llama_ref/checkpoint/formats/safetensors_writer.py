"""Write a `.safetensors` file block by block: a header in JSON, then the bytes of the tensors.

The safetensors library's writer needs all tensors of a file at once. Here they are produced while
they are written, so converting or quantizing a model needs memory for only some of its rows.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llama_ref.checkpoint.formats.atomic import new_file
from llama_ref.checkpoint.formats.lazy_tensor import BytesWritten, LazyTensor, bytes_of, check_writable
from llama_ref.checkpoint.formats.safetensors import DTYPES, LENGTH_BYTES

ALIGNMENT_BYTES = 64  # of the first tensor: a cache line, for kernels on memory-mapped tensors
TWO_VALUES_A_BYTE = "F4"  # whose shape in the header counts values, unlike torch's

DTYPE_NAMES = {  # torch's dtype: name in the file
    getattr(torch, torchs): name for name, (torchs, _) in DTYPES.items() if name != TWO_VALUES_A_BYTE and hasattr(torch, torchs)
}


def write_safetensors(path: str | Path, tensors: Sequence[LazyTensor], progress: BytesWritten | None = None) -> None:
    """Write the new file `path` atomically: tensors in the given order, wider dtypes first.

    The format allows no gaps, so tensors whose size would misalign the following ones come last.
    Raises CheckpointError if it cannot be written, ValueError if blocks do not match their tensor.
    """
    check_writable(tensors)
    in_order = _aligned(tensors)
    header = _header(in_order)
    with new_file(Path(path), len(header) + sum(tensor.nbytes for tensor in tensors)) as file:
        file.write(header)
        for tensor in in_order:
            tensor.write_to(file, progress)


def safetensors_pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file, from tensors in memory, for the caller to write."""
    in_order = _aligned([LazyTensor.from_tensor(name, tensor) for name, tensor in tensors.items()])
    check_writable(in_order)
    yield _header(in_order, metadata)
    for tensor in in_order:
        yield from map(bytes_of, tensor.blocks())


def _aligned(tensors: Sequence[LazyTensor]) -> list[LazyTensor]:
    """The tensors in an order that aligns each to its element size: wider dtypes first."""
    return sorted(tensors, key=lambda tensor: (tensor.nbytes % ALIGNMENT_BYTES > 0, -tensor.dtype.itemsize))  # stable


def _header(tensors: Sequence[LazyTensor], metadata: Mapping[str, str] | None = None) -> bytes:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt", **(metadata or {})}}  # transformers requires the format
    at = 0
    for tensor in tensors:
        if tensor.dtype not in DTYPE_NAMES or tensor.name in entries:
            raise ValueError(f"a safetensors file cannot hold {tensor.name} of {tensor.dtype}")
        offsets = [at, at := at + tensor.nbytes]
        entries[tensor.name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    data = json.dumps(entries, separators=(",", ":")).encode()
    data += b" " * (-(LENGTH_BYTES + len(data)) % ALIGNMENT_BYTES)
    return len(data).to_bytes(LENGTH_BYTES, "little") + data
