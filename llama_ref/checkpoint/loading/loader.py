"""Load a folder's weights into a Transformer, tensor by tensor.

Files are mapped, not read. If nothing has to change (CPU, the file's dtype, one slice), a parameter
uses the mapped pages directly, unless a private copy is requested. Otherwise each tensor is cast
and copied once, and its pages are released before the next. Copies to CUDA go through pinned
buffers (to_device.py), so the host never holds more than these buffers and one tensor.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.folder import CheckpointFolder
from llama_ref.checkpoint.loading.empty_model import model_without_memory
from llama_ref.checkpoint.loading.to_device import Target, pinned_copier
from llama_ref.checkpoint.meta_quantized.kinds import Kind
from llama_ref.checkpoint.meta_quantized.matrices import Activations, StoredMatrices, check_activations, matrices_of
from llama_ref.checkpoint.quantized_reader import StoredQuantized
from llama_ref.checkpoint.reader import Stored, Wanted, join, open_stored
from llama_ref.checkpoint.shapes import EMBEDDING, LEARNABLE, OUTPUT, VISION, expected_shapes
from llama_ref.errors import RequestError
from llama_ref.machine.memory import give_back_memory
from llama_ref.model import Transformer
from llama_ref.modules import replace_module
from llama_ref.parallel.sharding import WHOLE, Share, kv_heads, part_shape, split_dim, wanted_ranges
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.quantization.apply import check_columns, quantized, tie
from llama_ref.quantization.linear import QuantizedMatrix
from llama_ref.quantization.scheme import Scheme
from llama_ref.vision import VisionTransformer


def load_model(
    folder: CheckpointFolder,
    args: ModelArgs,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    share: Share = WHOLE,
    quantize: Scheme | str | None = None,
    activations: Activations | None = None,
    in_memory: bool = False,
    progress: Progress | None = None,
) -> Transformer:
    """Build the model of a folder, in `dtype` on `device`, frozen and in evaluation mode.

    With several processes, each reads and holds only its `share` of every matrix and its stage's
    layers. The model's `args` count these layers and key/value heads; tensors of other stages stay
    on the meta device. With `quantize`, each matrix is quantized from the files' values as soon as
    it is read, so that the whole model is never held unquantized; a quantized folder is loaded as
    it is. `activations` is the arithmetic of Meta's int4 and fp8 releases: "reference" (the default)
    rounds the inputs of their matrices, as Meta's code does, "full" does not. With `in_memory`, the
    model has its own copy of every weight, and the files may change afterwards. Raises
    CheckpointError as `open_stored` and `matrices_of` do, RequestError for a matrix that the
    scheme cannot hold, and for options that do not apply to the folder.
    """
    scheme = None if quantize is None else Scheme.parse(quantize)
    layers = share.layers(args.n_layers)
    crossed = [layer for layer in args.cross_layers if layer in layers]
    shapes = {name: shape for name, shape in expected_shapes(args).items() if _is_local(name, args, share, layers)}
    wanted = {name: wanted_ranges(name, args, share) for name in shapes}
    stored = _open(folder, args, wanted, scheme, activations)
    # Built only once its shape is known to match the files.
    crossed_in_stage = [layer - layers.start for layer in crossed]
    model = model_without_memory(replace(args, n_layers=len(layers), n_kv_heads=len(kv_heads(args, share))), crossed_in_stage)
    is_one_matrix = stored.tied and {EMBEDDING, OUTPUT} <= wanted.keys()
    if is_one_matrix:
        del wanted[OUTPUT]
    parts = {name: part_shape(name, shapes[name], ranges) for name, ranges in wanted.items()}
    if scheme and isinstance(stored, Stored):
        for name, shape in parts.items():
            check_columns(scheme, name, shape[-1])
    counter = ProgressCounter(sum(map(math.prod, parts.values())) * dtype.itemsize, progress)
    with pinned_copier(device) as copier:
        to = Target(device, copier, in_memory)
        for name, ranges in wanted.items():
            matrix: Tensor | QuantizedMatrix
            if not isinstance(stored, Stored):
                matrix = stored.matrix(name, ranges, dtype, to)
            elif scheme and scheme.bits_of(name):
                matrix = _quantized(scheme, name, stored, ranges, dtype, to)
            else:
                matrix = stored.joined(name, ranges, dtype, to)
            _set(model, _local_name(name, args, layers), matrix)
            if copier:
                give_back_memory()  # the C library would keep the memory of reordered copies
            counter.advance(math.prod(parts[name]) * dtype.itemsize)
    if is_one_matrix:
        tie(model)
    if isinstance(model, VisionTransformer) and LEARNABLE not in shapes:
        model.learnable_embedding = None
    return model.eval().requires_grad_(False)


def _open(
    folder: CheckpointFolder, args: ModelArgs, wanted: Wanted, scheme: Scheme | None, activations: Activations | None
) -> Stored | StoredMatrices:
    """Map a folder's files. Raises RequestError for options that do not apply to the folder."""
    if folder.is_quantized:
        check_activations(folder, activations, Kind.PLAIN)
        return StoredQuantized(folder, args, scheme)
    stored = open_stored(folder, args, wanted)
    check_activations(folder, activations, stored.kind)
    if stored.kind is Kind.PLAIN:
        return stored
    if scheme:
        raise RequestError(
            f"{folder.path} is quantized already (Meta's {stored.kind.value} release): leave quantize out, or convert it to "
            "bf16 first (`llama-ref convert --to meta`)"
        )
    return matrices_of(folder, args, stored, activations)


def _is_local(name: str, args: ModelArgs, share: Share, layers: range) -> bool:
    """Whether a share's stage needs the tensor; a tied output counts under its own name."""
    if name.startswith("layers."):
        return _number(name) in layers
    if name.startswith("cross_attention_layers."):
        return args.cross_layers[_number(name)] in layers
    if name.startswith(VISION):
        return True  # each stage's cross-attention layers read the encoder's output
    return share.is_first_stage if name in (EMBEDDING, LEARNABLE) else share.is_last_stage


def _local_name(name: str, args: ModelArgs, layers: range) -> str:
    """A tensor's name in the stage's model, where layers count from 0."""
    kind, _, _ = name.partition(".")
    if kind == "layers":
        earlier = layers.start
    elif kind == "cross_attention_layers":
        earlier = sum(layer < layers.start for layer in args.cross_layers)
    else:
        return name
    number = _number(name)
    return name.replace(f"{kind}.{number}.", f"{kind}.{number - earlier}.", 1)


def _number(name: str) -> int:
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
    dtype: torch.dtype,
    to: Target,
) -> Tensor | QuantizedMatrix:
    """Quantize a tensor from the files' dtype: the model's dtype does not change the result."""
    slices = stored.slices(name, ranges)
    weight = join(slices, split_dim(name), stored.dtype(name), to)
    out = quantized(scheme, name, weight, dtype)
    for each in slices:
        each.release()
    give_back_memory()
    return weight if out is None else out
