"""Weight-only quantization, applied to a model from outside.

quantize_model(model, Scheme.parse("int4"))  # a model in memory; checkpoint/loading/loader.py does it while loading
use_fast_kernels(model)                      # for eager use: the layouts of PyTorch's kernels
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from llama_ref.machine.memory import give_back_memory
from llama_ref.model import Transformer
from llama_ref.modules import replace_module
from llama_ref.quantization.linear import Int4Linear, Int8Embedding, Int8Linear, QuantizedMatrix
from llama_ref.quantization.scheme import Scheme
from llama_ref.quantization.torch_int4 import faster

M = TypeVar("M", bound=QuantizedMatrix)


def quantize_model(model: Transformer, scheme: Scheme | str) -> None:
    """Replace the embedding and the linear layers by quantized ones, in place, each weight freed before the next.

    Raises RequestError for a matrix that does not fit the scheme, before anything is changed.
    """
    scheme = Scheme.parse(scheme)
    tied = model.output.weight is model.tok_embeddings.weight
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    for name in names:
        check_columns(scheme, f"{name}.weight", _weight(model, name).shape[1])
    for name in names:
        if name == "output" and tied:
            continue
        weight = _weight(model, name).data
        matrix = quantized(scheme, f"{name}.weight", weight, weight.dtype)
        if matrix is not None:
            replace_module(model, name, matrix)
    if tied:
        tie(model)


def _weight(model: Transformer, name: str) -> Tensor:
    return model.get_parameter(f"{name}.weight")


def check_columns(scheme: Scheme, name: str, columns: int) -> None:
    """Raise RequestError if no group size of the scheme divides a tensor's columns."""
    if scheme.bits_of(name) == 4:
        scheme.group_for(name, columns)


def quantized(scheme: Scheme, name: str, weight: Tensor, dtype: torch.dtype) -> QuantizedMatrix | None:
    """Quantize a tensor to a module, chosen by its name ("layers.0.attention.wq.weight").

    None if not quantized.
    `dtype` is the embedding's output dtype.
    """
    bits = scheme.bits_of(name)
    if bits is None:
        return None
    if bits == 4:
        return Int4Linear.from_weight(weight, scheme.group_for(name, weight.shape[1]))
    matrix = Int8Linear.from_weight(weight)
    return Int8Embedding(matrix.q, matrix.scale, dtype) if name == "tok_embeddings.weight" else matrix


def replace_matrices(model: nn.Module, kind: type[M], new: Callable[[M], nn.Module]) -> None:
    """Replace every matrix of a type by `new(matrix)`, one at a time to save memory."""
    # By name, because a list of the modules would keep all of them alive.
    for name in [name for name, module in model.named_modules() if type(module) is kind]:
        matrix = model.get_submodule(name)
        assert isinstance(matrix, kind)
        replace_module(model, name, new(matrix))
        del matrix
        give_back_memory()


def tie(model: Transformer) -> None:
    """Tie the output to the embedding's matrix, quantized or not."""
    embedding = model.get_submodule("tok_embeddings")
    if isinstance(embedding, Int8Embedding):
        replace_module(model, "output", Int8Linear(embedding.q, embedding.scale))
    else:
        model.output.weight = model.tok_embeddings.weight


def use_fast_kernels(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Convert int4 matrices to the layout of PyTorch's kernel for the device and `dtype`, if any.

    `dtype` is the activations' dtype (default: the dtype of the model's norms). For eager use only:
    the compiled steps read the plain modules.
    """
    activations = dtype or next(parameter.dtype for parameter in model.parameters())
    replace_matrices(model, Int4Linear, lambda matrix: faster(matrix, activations))


def is_quantized(model: nn.Module) -> bool:
    """Whether any of a model's matrices is quantized."""
    return any(isinstance(module, QuantizedMatrix) for module in model.modules())


def quantized_bytes(model: nn.Module) -> int:
    """Total bytes of the quantized matrices; a tied one counts once."""
    buffers = {
        buffer.data_ptr(): buffer.nbytes
        for module in model.modules()
        if isinstance(module, QuantizedMatrix)
        for buffer in module.buffers()
    }
    return sum(buffers.values())
