"""Products of the fused layers on CUDA (cuda.py): the right kernel for a matrix's kind and the number of rows.

With Triton a single row runs through one kernel with what stands around the product in a layer (cuda_products.py), a few rows
of a quantized matrix through another; many rows are cuBLAS's, of a quantized matrix once it is turned into the inputs' dtype.
Without Triton every function is model.py's lines.
"""

import torch
from torch import Tensor, nn

from llama_ref.compiled.cuda_kernels import rms_norm, rotate_and_store, silu_mul
from llama_ref.device import has_triton
from llama_ref.model import RMSNorm
from llama_ref.quantization.linear import Int4Linear, Int8Linear

if has_triton():
    from llama_ref.compiled.cuda_products import matvec


def joined(*modules: nn.Module) -> nn.Module:
    """One matrix with the rows of several below one another; theirs become views of it. They are of one kind and width."""
    kind = type(modules[0])
    if kind is Int8Linear:
        return Int8Linear(*(_join_buffers(modules, name) for name in ("q", "scale")))
    if kind is Int4Linear:
        return Int4Linear(*(_join_buffers(modules, name) for name in ("packed", "scale", "zero")))
    weight = torch.cat([module.weight.data for module in modules])
    for module, part in zip(modules, weight.split([len(module.weight) for module in modules]), strict=True):
        module.weight.data = part
    with torch.device("meta"):
        out = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    out.weight = nn.Parameter(weight, requires_grad=False)
    return out


def _join_buffers(modules: tuple[nn.Module, ...], name: str) -> Tensor:
    parts = [getattr(module, name) for module in modules]
    whole = torch.cat(parts)
    for module, part in zip(modules, whole.split([len(part) for part in parts]), strict=True):
        setattr(module, name, part)
    return whole


def linear(x: Tensor, matrix: nn.Module, add: Tensor | None = None) -> Tensor:
    """x (N, K) times a matrix (M, K), plus `add` (N, M): (N, M)."""
    if _is_one_row(x):
        return matvec(x[0], *_tensors(matrix), residual=None if add is None else add[0])[None]
    if add is None:
        return matrix(x)
    if isinstance(matrix, nn.Linear) and x.is_cuda:
        return torch.addmm(add, x, matrix.weight.T)
    return add + matrix(x)


def norm_linear(x: Tensor, norm: RMSNorm, matrix: nn.Module) -> Tensor:
    """`linear` of the normed x."""
    if _is_one_row(x):
        return matvec(x[0], *_tensors(matrix), gain=norm.weight, eps=norm.eps)[None]
    return linear(rms_norm(x, norm.weight, norm.eps), matrix)


def norm_swiglu(x: Tensor, norm: RMSNorm, matrix: nn.Module) -> Tensor:
    """silu(w1 h) · (w3 h) for h, the normed x (N, K), and w1, w3 joined (2F, K): (N, F)."""
    if _is_one_row(x):
        return matvec(x[0], *_tensors(matrix), gain=norm.weight, eps=norm.eps, gated=True)[None]
    return silu_mul(norm_linear(x, norm, matrix))


def norm_query(
    x: Tensor, norm: RMSNorm, matrix: nn.Module, positions: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Rotated queries (N, H, hd) of the normed x (N, D) by wq, wk, wv joined; keys and values are stored in a layer's cache.

    `positions`, cos, sin and the cache's keys and values (B, K, S, hd) as in `rotate_and_store`.
    """
    _, K, _, head_dim = keys.shape
    if _is_one_row(x):
        rope = cos, sin, keys[0], values[0], positions
        q = matvec(x[0], *_tensors(matrix), gain=norm.weight, eps=norm.eps, rope=rope)
        return q.view(1, -1, head_dim)
    qkv = norm_linear(x, norm, matrix)
    return rotate_and_store(qkv, positions, cos, sin, keys, values, qkv.shape[1] // head_dim - 2 * K)


def _is_one_row(x: Tensor) -> bool:
    return x.is_cuda and len(x) == 1 and has_triton()


def _tensors(matrix: nn.Module) -> tuple[Tensor, ...]:
    """What `matvec` takes."""
    if isinstance(matrix, Int4Linear):
        return matrix.packed, matrix.scale, matrix.zero
    if isinstance(matrix, Int8Linear):
        return matrix.q, matrix.scale
    return (matrix.weight,)
