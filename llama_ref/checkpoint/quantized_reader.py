"""Read a quantized folder: params.json names the scheme, safetensors hold integers and scales.

Tensors have the names of the modules' buffers (quantization/linear.py): an int8 matrix is
`layers.0.attention.wq.q` and `….scale`, an int4 matrix `….packed`, `….scale` and `….zero`. Norms
stay `….weight`, and a tied output is left out. Files are mapped; on a CPU the model's buffers are
the files' own pages, except those that are not aligned or must be private (`_on_cpu`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.folder import QUANTIZATION, CheckpointFolder
from llama_ref.checkpoint.formats.safetensors import map_safetensors
from llama_ref.checkpoint.loading.to_device import Target
from llama_ref.checkpoint.reader import TensorSlice, check_problems, has_output
from llama_ref.checkpoint.shapes import (
    EMBEDDING,
    OUTPUT,
    WEIGHT_DTYPES,
    Expected,
    Shape,
    dtypes_and_shapes,
    expected_shapes,
    misfit,
)
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.formatting import dtype_name
from llama_ref.parallel.sharding import split_dim
from llama_ref.quantization.linear import Int4Linear, Int8Embedding, Int8Linear, QuantizedMatrix
from llama_ref.quantization.scheme import Scheme

KERNEL_ALIGNMENT = 16  # bytes; PyTorch's int8 kernel segfaults on others


def scheme_of(folder: CheckpointFolder, args: ModelArgs) -> Scheme:
    """The scheme in a folder's params.json. Raises CheckpointError."""
    try:
        return Scheme.from_params(args.extra.get(QUANTIZATION))
    except CheckpointError as error:
        raise CheckpointError(f"{folder.params}: {error}") from None


def parts_of(scheme: Scheme, name: str, shape: Shape) -> dict[str, tuple[Shape, torch.dtype | None]]:
    """The stored tensors of one weight: name -> (shape, dtype); dtype None is any weight dtype."""
    stem, bits = name.removesuffix(".weight"), scheme.bits_of(name)
    if bits is None:
        return {name: (shape, None)}
    rows, columns = shape
    if bits == 8:
        return {f"{stem}.q": (shape, torch.int8), f"{stem}.scale": ((rows,), torch.float32)}
    groups = (rows, columns // scheme.group_for(name, columns))
    return {
        f"{stem}.packed": ((rows, columns // 2), torch.uint8),
        f"{stem}.scale": (groups, torch.bfloat16),
        f"{stem}.zero": (groups, torch.bfloat16),
    }


class StoredQuantized:
    """A quantized folder's matrices. `tied`: the output matrix is the embedding.

    Raises CheckpointError for files that do not fit params.json, RequestError if `asked` is another
    scheme.
    """

    def __init__(self, folder: CheckpointFolder, args: ModelArgs, asked: Scheme | None = None):
        self.folder = folder
        self.scheme = scheme_of(folder, args)
        if asked not in (None, self.scheme):
            raise RequestError(
                f"{folder.path} is already quantized to {self.scheme}; leave quantize out, or quantize the original "
                f"folder to {asked}"
            )
        files = [map_safetensors(path) for path in folder.shards]
        self.tensors = {name: tensor for tensors in files for name, tensor in tensors.items()}
        self.tied = not has_output(self.tensors)
        self._check(expected_shapes(args))

    def matrix(self, name: str, ranges: list[range] | None, dtype: torch.dtype, to: Target) -> Tensor | QuantizedMatrix:
        """The `ranges` of a matrix as a module, or of an unquantized tensor as a tensor in `dtype`.

        Raises RequestError for ranges that split a group.
        """

        def on_device(tensor: Tensor, ranges: list[range] | None = None, dim: int | None = None) -> Tensor:
            part = _narrow(tensor, ranges, dim)
            if to.copier is None:
                return _on_cpu(part, tensor, to.in_memory) if torch.device(to.device).type == "cpu" else part.to(to.device)
            out = torch.empty(part.shape, dtype=part.dtype, device=to.device)
            TensorSlice(part, tensor).copy_to(out, to.copier)
            return out

        source = EMBEDDING if self.tied and name == OUTPUT else name
        stem, bits = source.removesuffix(".weight"), self.scheme.bits_of(name)
        if bits is None:
            return on_device(self.tensors[name]).to(dtype)
        dim = split_dim(name)
        if bits == 8:
            q = on_device(self.tensors[f"{stem}.q"], ranges, dim)
            scale = on_device(self.tensors[f"{stem}.scale"], ranges if dim == 0 else None, 0)
            return Int8Embedding(q, scale, dtype) if name == EMBEDDING else Int8Linear(q, scale)
        packed, scale, zero = (self.tensors[f"{stem}.{part}"] for part in ("packed", "scale", "zero"))
        group = 2 * packed.shape[1] // scale.shape[1]
        if ranges and dim == 1:
            self._check_groups(name, ranges, group)
            halves = [range(each.start // 2, each.stop // 2) for each in ranges]
            ranges = [range(each.start // group, each.stop // group) for each in ranges]
            return Int4Linear(on_device(packed, halves, 1), *(on_device(t, ranges, 1) for t in (scale, zero)))
        return Int4Linear(*(on_device(tensor, ranges, 0) for tensor in (packed, scale, zero)))

    def _check_groups(self, name: str, ranges: list[range], group: int) -> None:
        for each in ranges:
            if each.start % group or each.stop % group:
                raise RequestError(
                    f"{name} of {self.folder.path} has groups of {group} weights, which this number of processes "
                    f"would split (columns {each.start:,} to {each.stop:,}): start another number of processes, or quantize "
                    "the original while loading"
                )

    def _check(self, shapes: Mapping[str, Shape]) -> None:
        expected: dict[str, tuple[Shape, torch.dtype | None]] = {}
        for name, shape in shapes.items():
            if not (name == OUTPUT and self.tied):
                try:
                    expected |= parts_of(self.scheme, name, shape)
                except RequestError as error:
                    raise CheckpointError(f"{self.folder.params}: {error}") from None
        found, problems = dtypes_and_shapes(self.tensors), []
        for name, (shape, dtype) in expected.items():
            problem = misfit(name, found.get(name), Expected(shape, WEIGHT_DTYPES if dtype is None else (dtype_name(dtype),)))
            problems += [problem] if problem else []
        problems += [f"{name} is unexpected" for name in sorted(self.tensors.keys() - expected.keys())]
        check_problems(self.folder, problems)


def _narrow(tensor: Tensor, ranges: list[range] | None, dim: int | None) -> Tensor:
    """The ranges of a tensor along `dim`, contiguous; without ranges, the mapped tensor itself."""
    if ranges is None or dim is None:
        return tensor
    parts = [tensor.narrow(dim, each.start, len(each)) for each in ranges]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim)).contiguous()


def _on_cpu(part: Tensor, mapped: Tensor, in_memory: bool) -> Tensor:
    """A contiguous part of a mapped tensor; a copy if it must be private or misses KERNEL_ALIGNMENT.

    Other programs align tensors to 8 bytes only, and the rows of a share may start at any offset.
    """
    slice_ = TensorSlice(part, mapped)
    if part.data_ptr() % KERNEL_ALIGNMENT == 0 and not (in_memory and slice_.is_mapped):
        return part
    copy = torch.empty_like(part)
    slice_.copy_to(copy)
    return copy
