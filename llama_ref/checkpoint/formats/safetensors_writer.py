"""Write a `.safetensors` block by block: an index in JSON, then the tensors' bytes one after another."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from llama_ref.checkpoint.formats.atomic import new_file
from llama_ref.checkpoint.formats.lazy_tensor import BytesWritten, LazyTensor, check_writable

LENGTH_BYTES = 8  # the index's length in front of it
ALIGNMENT_BYTES = 64  # of where the tensors begin: a cache line, and the widest vectors; kernels may want mapped ones aligned

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(path: str | Path, tensors: Sequence[LazyTensor], progress: BytesWritten | None = None) -> None:
    """Write the new file `path`, whole or not at all: the tensors in their order, those of wider dtypes first.

    The format allows no gaps, so tensors whose sizes would misalign those behind them come last. Raises CheckpointError where
    it cannot be written, ValueError where blocks do not make their tensor.
    """
    check_writable(tensors)
    # Stable. A wider dtype before a narrower one keeps each aligned to its own items.
    tensors = sorted(tensors, key=lambda tensor: (tensor.nbytes % ALIGNMENT_BYTES > 0, -tensor.dtype.itemsize))
    index = _index(tensors)
    with new_file(Path(path), len(index) + sum(tensor.nbytes for tensor in tensors)) as file:
        file.write(index)
        for tensor in tensors:
            tensor.write_to(file, progress)


def _index(tensors: Sequence[LazyTensor]) -> bytes:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    at = 0
    for tensor in tensors:
        if tensor.dtype not in DTYPE_NAMES or tensor.name in entries:
            raise ValueError(f"a tensor {tensor.name} of {tensor.dtype} has no place in a safetensors file")
        offsets = [at, at := at + tensor.nbytes]
        entries[tensor.name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    data = json.dumps(entries, separators=(",", ":")).encode()
    data += b" " * (-(LENGTH_BYTES + len(data)) % ALIGNMENT_BYTES)
    return len(data).to_bytes(LENGTH_BYTES, "little") + data
