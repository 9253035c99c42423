"""Load a folder's weights into a Transformer, tensor by tensor.

Files are mapped, not read. If nothing has to change (CPU, the file's dtype, one slice), a parameter
is the file's pages themselves, unless a private copy is asked for. Otherwise each tensor is cast
and copied once, and its pages are released before the next. Copies to CUDA go through pinned
buffers (to_device.py), so that the host holds no more than these and one tensor.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.empty_model import model_without_memory
from llama_ref.checkpoint.folder import CheckpointFolder
from llama_ref.checkpoint.quantized_reader import StoredQuantized
from llama_ref.checkpoint.reader import Stored, TensorSlice, open_stored
from llama_ref.checkpoint.shapes import EMBEDDING, OUTPUT, expected_shapes
from llama_ref.checkpoint.to_device import PinnedCopier, pinned_copier
from llama_ref.memory import give_back_memory
from llama_ref.model import Transformer
from llama_ref.modules import replace_module
from llama_ref.parallel.sharding import WHOLE, Share, kv_heads, part_shape, split_dim, wanted_ranges
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.quantization.apply import check_columns, quantized, tie
from llama_ref.quantization.linear import QuantizedMatrix
from llama_ref.quantization.scheme import Scheme


def load_model(
    folder: CheckpointFolder,
    args: ModelArgs,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    share: Share = WHOLE,
    quantize: Scheme | str | None = None,
    in_memory: bool = False,
    progress: Progress | None = None,
) -> Transformer:
    """Build the model of a folder, in `dtype` on `device`, frozen and in evaluation mode.

    With several processes, each reads and holds only its `share` of every matrix and its stage's
    layers. The model's `args` count these layers and key/value heads; tensors of other stages stay
    on the meta device. With `quantize`, each matrix is quantized from the files' numbers as soon as
    it is read, so that the whole model is never held unquantized; a quantized folder is loaded as
    it is. With `in_memory`, the model has its own copy of every weight, and the files may change
    afterwards. Raises CheckpointError as `open_stored` does, RequestError for a matrix that the
    scheme cannot hold.
    """
    scheme = None if quantize is None else Scheme.parse(quantize)
    layers = share.layers(args.n_layers)
    shapes = {name: shape for name, shape in expected_shapes(args).items() if _is_local(name, share, layers)}
    wanted = {name: wanted_ranges(name, args, share) for name in shapes}
    stored: Stored | StoredQuantized
    if folder.is_quantized:
        stored = StoredQuantized(folder, args, scheme)
    else:
        stored = open_stored(folder, args, wanted)
    # Built only when its shape is known to be that of the files.
    model = model_without_memory(replace(args, n_layers=len(layers), n_kv_heads=len(kv_heads(args, share))))
    is_one_matrix = stored.tied and {EMBEDDING, OUTPUT} <= wanted.keys()
    if is_one_matrix:
        del wanted[OUTPUT]
    parts = {name: part_shape(name, shapes[name], ranges) for name, ranges in wanted.items()}
    if scheme:
        for name, shape in parts.items():
            check_columns(scheme, name, shape[-1])
    counter = ProgressCounter(sum(map(math.prod, parts.values())) * dtype.itemsize, progress)
    with pinned_copier(device) as copier:
        for name, ranges in wanted.items():
            matrix: Tensor | QuantizedMatrix
            if isinstance(stored, StoredQuantized):
                matrix = stored.matrix(name, ranges, device, dtype, copier, in_memory)
            elif scheme and scheme.bits_of(name):
                matrix = _quantized(scheme, name, stored, ranges, device, dtype, copier)
            else:
                matrix = _join(stored.slices(name, ranges), split_dim(name), device, dtype, copier, in_memory)
            _set(model, _local_name(name, layers), matrix)
            if copier:
                give_back_memory()  # of reordered copies, which the C library would keep
            counter.advance(math.prod(parts[name]) * dtype.itemsize)
    if is_one_matrix:
        tie(model)
    return model.eval().requires_grad_(False)


def _is_local(name: str, share: Share, layers: range) -> bool:
    """Whether a share's stage needs the tensor; a tied output counts under its own name."""
    if name.startswith("layers."):
        return _layer(name) in layers
    return share.is_first_stage if name == EMBEDDING else share.is_last_stage


def _local_name(name: str, layers: range) -> str:
    """A tensor's name in the stage's model, where layers count from 0."""
    if not name.startswith("layers."):
        return name
    layer = _layer(name)
    return name.replace(f"layers.{layer}.", f"layers.{layer - layers.start}.", 1)


def _layer(name: str) -> int:
    return int(name.split(".")[1])


def _set(model: Transformer, name: str, matrix: Tensor | QuantizedMatrix) -> None:
    """Set a weight, or replace its module by a quantized one."""
    owner, _, attribute = name.rpartition(".")
    if isinstance(matrix, QuantizedMatrix):
        replace_module(model, owner, matrix)
    else:
        setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(matrix, requires_grad=False))


def _quantized(
    scheme: Scheme,
    name: str,
    stored: Stored,
    ranges: list[range] | None,
    device: torch.device | str,
    dtype: torch.dtype,
    copier: PinnedCopier | None,
) -> Tensor | QuantizedMatrix:
    """Quantize a tensor from the files' dtype: the model's dtype does not change the result."""
    slices = stored.slices(name, ranges)
    weight = _join(slices, split_dim(name), device, stored.dtype(name), copier)
    out = quantized(scheme, name, weight, dtype)
    for each in slices:
        each.release()
    give_back_memory()
    return weight if out is None else out


def _join(
    slices: list[TensorSlice],
    dim: int | None,
    device: torch.device | str,
    dtype: torch.dtype,
    copier: PinnedCopier | None,
    in_memory: bool = False,
) -> Tensor:
    """Join a tensor's slices, in `dtype` on `device`.

    No copy is made if the mapped pages will do; with `in_memory` they never do.
    """
    first = slices[0].tensor
    may_be_used = len(slices) == 1 and not (in_memory and slices[0].is_mapped)
    if may_be_used and first.is_contiguous() and first.dtype == dtype and first.device == torch.device(device):
        if not slices[0].is_mapped:
            slices[0].release()
        return first
    dim = dim or 0
    sizes = [each.tensor.shape[dim] for each in slices]
    shape = list(first.shape)
    shape[dim] = sum(sizes)
    whole = torch.empty(shape, dtype=dtype, device=device)
    for each, target in zip(slices, whole.split(sizes, dim), strict=True):
        each.copy_to(target, copier)
    return whole
