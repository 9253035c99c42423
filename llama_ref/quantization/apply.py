"""Weight-only quantization, put onto a model from outside.

quantize_model(model, Scheme.parse("int4"))  # a model in memory; checkpoint/loader.py does it while loading
use_fast_kernels(model)                      # eager: into the layouts of PyTorch's own kernels
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llama_ref.memory import give_back_memory
from llama_ref.model import Transformer
from llama_ref.quantization.linear import Int4Linear, Int8Embedding, Int8Linear, QuantizedMatrix
from llama_ref.quantization.scheme import Scheme
from llama_ref.quantization.torch_int4 import faster


def quantize_model(model: Transformer, scheme: Scheme | str) -> None:
    """Replace the embedding and the linear layers by quantized ones, in place, each weight freed before the next.

    Raises RequestError for a matrix that the scheme cannot hold, before anything is changed.
    """
    scheme = Scheme.parse(scheme)
    tied = model.output.weight is model.tok_embeddings.weight
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    for name in names:
        check_columns(scheme, f"{name}.weight", model.get_submodule(name).weight.shape[1])
    for name in names:
        if name == "output" and tied:
            continue
        weight = model.get_submodule(name).weight.data
        replace_module(model, name, quantized(scheme, f"{name}.weight", weight, weight.dtype))
    if tied:
        tie(model)


def check_columns(scheme: Scheme, name: str, columns: int) -> None:
    """Raise RequestError where the scheme has no groups for a tensor's rows."""
    if scheme.bits_of(name) == 4:
        scheme.group_for(name, columns)


def quantized(scheme: Scheme, name: str, weight: Tensor, dtype: torch.dtype) -> QuantizedMatrix | None:
    """A tensor's module by its name ("layers.0.attention.wq.weight"); None for one that stays as it is.

    `dtype` is what the embedding gives.
    """
    bits = scheme.bits_of(name)
    if bits is None:
        return None
    if bits == 4:
        return Int4Linear.of(weight, scheme.group_for(name, weight.shape[1]))
    matrix = Int8Linear.of(weight)
    return Int8Embedding(matrix.q, matrix.scale, dtype) if name == "tok_embeddings.weight" else matrix


def replace_matrices(model: nn.Module, kind: type[QuantizedMatrix], new: Callable[[QuantizedMatrix], nn.Module]) -> None:
    """Put `new(matrix)` in the place of every matrix of a kind, one by one, so that two layouts of a single one are held."""
    # By name: a list of the modules would keep all of them while they are replaced.
    for name in [name for name, module in model.named_modules() if type(module) is kind]:
        replace_module(model, name, new(model.get_submodule(name)))
        give_back_memory()


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of that name ("layers.0.attention.wq")."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, module)


def tie(model: Transformer) -> None:
    """Make the output the embedding's own numbers, quantized or not."""
    if isinstance(model.tok_embeddings, Int8Embedding):
        model.output = Int8Linear(model.tok_embeddings.q, model.tok_embeddings.scale)
    else:
        model.output.weight = model.tok_embeddings.weight


def use_fast_kernels(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put four-bit matrices into the layouts of PyTorch's kernels, one by one, where there are such for the device and `dtype`.

    `dtype` is that of the states (default: that of the model's norms). For eager use: what compiles its own kernels reads the
    plain modules.
    """
    dtype = dtype or next(parameter.dtype for parameter in model.parameters())
    replace_matrices(model, Int4Linear, lambda matrix: faster(matrix, dtype))


def is_quantized(model: nn.Module) -> bool:
    """Whether any of a model's matrices is."""
    return any(isinstance(module, QuantizedMatrix) for module in model.modules())


def quantized_bytes(model: nn.Module) -> int:
    """What the quantized matrices take in memory; one that is tied counts once."""
    buffers = {
        buffer.data_ptr(): buffer.nbytes
        for module in model.modules()
        if isinstance(module, QuantizedMatrix)
        for buffer in module.buffers()
    }
    return sum(buffers.values())
