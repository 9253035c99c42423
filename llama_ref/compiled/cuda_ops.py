"""The parts of a fused layer on CUDA (cuda.py): each picks the kernel for the device, matrix and number of rows.

With Triton, a single row is one kernel that fuses a product with the operations around it, and a few
rows of a quantized matrix another; many rows go to cuBLAS, with quantized matrices converted first.
Without Triton every function computes what model.py does. Triton modules are imported lazily.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ref.compiled.triton.probe import uses_triton
from llama_ref.model import RMSNorm, rotate
from llama_ref.quantization.linear import Int4Linear, Int8Linear, QuantizedMatrix, RowBlocks


def joined(*modules: nn.Module) -> nn.Module:
    """Several matrices of one type and width stacked into one; the originals become views of it.

    Matrices of Meta's quantized releases, whose products need more steps, stay separate
    (RowBlocks).
    """
    kind = type(modules[0])
    if kind is Int8Linear:
        return Int8Linear(*(_join_buffers(modules, name) for name in ("q", "scale")))
    if isinstance(modules[0], Int4Linear):
        names = ("packed", "scale") if modules[0].zero is None else ("packed", "scale", "zero")
        return Int4Linear(*(_join_buffers(modules, name) for name in names))
    if isinstance(modules[0], QuantizedMatrix):
        return RowBlocks([module for module in modules if isinstance(module, QuantizedMatrix)])
    weights = [module.get_parameter("weight") for module in modules]
    weight = torch.cat([each.data for each in weights])
    for each, part in zip(weights, weight.split([len(each) for each in weights]), strict=True):
        each.data = part
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
    if _is_fused(x, matrix):
        return _matvec(x, matrix, residual=None if add is None else add[0])
    if _is_matmul(x, matrix):
        return _matmul(x, matrix, residual=add)
    if add is None:
        return matrix(x)
    if isinstance(matrix, nn.Linear) and x.is_cuda:
        return torch.addmm(add, x, matrix.weight.T)
    return add + matrix(x)


def norm(x: Tensor, module: RMSNorm) -> Tensor:
    """RMSNorm of x (N, D)."""
    if not uses_triton(x):
        return module(x)
    from llama_ref.compiled.triton.elementwise import rms_norm

    return rms_norm(x, module.weight, module.eps)


def norm_linear(x: Tensor, module: RMSNorm, matrix: nn.Module) -> Tensor:
    """`linear` of the normed x."""
    if _is_fused(x, matrix):
        return _matvec(x, matrix, module)
    return linear(norm(x, module), matrix)


def norm_swiglu(x: Tensor, module: RMSNorm, matrix: nn.Module) -> Tensor:
    """silu(w1 h) · (w3 h) for h, the normed x (N, K), and w1, w3 joined (2F, K): (N, F)."""
    if _is_fused(x, matrix):
        return _matvec(x, matrix, module, gated=True)
    if _is_matmul(x, matrix):
        return _matmul(norm(x, module), matrix, gated=True)
    gate_up = norm_linear(x, module, matrix)
    if not uses_triton(x):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    from llama_ref.compiled.triton.elementwise import silu_mul

    return silu_mul(gate_up)


def norm_query(
    x: Tensor, module: RMSNorm, matrix: nn.Module, positions: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Rotated queries (N, H, hd) of the normed x (N, D) by joined wq, wk, wv; stores keys and values.

    N tokens are T of each of B rows, at int64 `positions` (N,); cos and sin are float32 (S, hd/2)
    for all positions. keys and values (B, K, S, hd) are one layer's cache, with the same strides,
    that of hd 1.
    """
    B, K, _, head_dim = keys.shape
    if _is_fused(x, matrix):
        q = _matvec(x, matrix, module, rope=(cos, sin, keys[0], values[0], positions))
        return q.view(1, -1, head_dim)
    qkv = norm_linear(x, module, matrix)  # (N, (H + 2K) · hd)
    n_heads = qkv.shape[1] // head_dim - 2 * K
    if uses_triton(x):
        from llama_ref.compiled.triton.elementwise import rotate_and_store

        return rotate_and_store(qkv, positions, cos, sin, keys, values, n_heads)
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split((n_heads, K, K), dim=1)  # (N, heads, hd)
    angles = cos[positions][None, :, None], sin[positions][None, :, None]  # (1, N, 1, hd/2)
    q, k = (rotate(x[None], *angles)[0] for x in (q, k))
    rows = torch.arange(B, device=x.device).repeat_interleave(len(x) // B)
    keys.transpose(1, 2).index_put_((rows, positions), k)
    values.transpose(1, 2).index_put_((rows, positions), v)
    return q


def likeliest(logits: Tensor) -> Tensor:
    """Ids (B,) of the largest logit in each row of float32 logits (B, V), on any device."""
    if not uses_triton(logits):
        return logits.argmax(-1)
    from llama_ref.compiled.triton.elementwise import row_stats

    return row_stats(logits)[0]


def log_normalizer(logits: Tensor) -> Tensor:
    """log Σ exp of each row of float32 logits (B, V), on any device: (B,)."""
    if not uses_triton(logits):
        return logits.logsumexp(-1)
    from llama_ref.compiled.triton.elementwise import row_stats

    return row_stats(logits)[1]


def _is_fused(x: Tensor, matrix: nn.Module) -> bool:
    """Whether one kernel computes a product with one row x and the operations around it."""
    return len(x) == 1 and uses_triton(x) and isinstance(matrix, nn.Linear | Int8Linear | Int4Linear)


def _is_matmul(x: Tensor, matrix: nn.Module) -> bool:
    """Whether one kernel computes a quantized matrix's product with a few rows and what follows."""
    if not uses_triton(x) or not isinstance(matrix, Int8Linear | Int4Linear):
        return False
    from llama_ref.compiled.triton.products import MOST_ROWS, has_tensor_cores

    return 1 < len(x) <= MOST_ROWS and has_tensor_cores(x.device)


def _matmul(x: Tensor, matrix: nn.Module, *, residual: Tensor | None = None, gated: bool = False) -> Tensor:
    """x (M, K) times a quantized matrix. Options as `matmul`'s."""
    from llama_ref.compiled.triton.products import matmul

    return matmul(x.contiguous(), *_tensors(matrix), residual=residual, gated=gated)


def _matvec(
    x: Tensor,
    matrix: nn.Module,
    module: RMSNorm | None = None,
    *,
    residual: Tensor | None = None,
    gated: bool = False,
    rope: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """x (1, K), normed if a norm is given, times a matrix of any type: (1, …). Options as `matvec`'s."""
    from llama_ref.compiled.triton.products import matvec

    gain, eps = (None, 0.0) if module is None else (module.weight, module.eps)
    return matvec(x[0], *_tensors(matrix), gain=gain, eps=eps, residual=residual, gated=gated, rope=rope)[None]


def _tensors(matrix: nn.Module) -> tuple[Tensor, ...]:
    if isinstance(matrix, Int4Linear):
        return (matrix.packed, matrix.scale) if matrix.zero is None else (matrix.packed, matrix.scale, matrix.zero)
    if isinstance(matrix, Int8Linear):
        return matrix.q, matrix.scale
    return (matrix.get_parameter("weight"),)
