"""A faster decode step for a CPU: each layer is one compiled loop over its weights.

A decode step mostly reads weights, so its speed is limited by memory bandwidth. Written as multiply
and sum over each row, a matrix-vector product compiles (torch.compile, Inductor) to a loop that
streams the rows. All layers have the same shapes and share one compiled function, which takes their
weights as arguments and compiles in seconds. Prompts and batches run model.py's blocks.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Thread
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ref.compiled import int4_layout
from llama_ref.compiled.caches import new_cache
from llama_ref.compiled.cpu_cache import CACHE_BLOCK, BlockKVCache
from llama_ref.compiled.cuda import compile_cuda_decode
from llama_ref.compiled.forward import CompiledForward, install
from llama_ref.compiled.int4_layout import COLUMNS, PlanarInt4Linear, materialize
from llama_ref.compiled.int8_layout import PIECE, PiecewiseInt8Linear, in_pieces
from llama_ref.errors import RequestError
from llama_ref.machine.onednn import onednn_for
from llama_ref.model import Context, Transformer, TransformerBlock, rms_norm
from llama_ref.parallel.pipeline import LogitsForAll
from llama_ref.parallel.tensor import RowParallelLinear
from llama_ref.quantization.apply import replace_matrices, use_fast_kernels
from llama_ref.quantization.fp8 import Fp8Linear
from llama_ref.quantization.hadamard import Factors, hadamard_factors
from llama_ref.quantization.linear import Int4Linear, Int8Linear, Int8Matrix
from llama_ref.quantization.meta_int4 import MetaInt4Linear, surrounded

logger = logging.getLogger(__name__)

STREAMS = 4  # rows read in parallel, which share loads of the vector; more is slower
NEVER = 10**6
OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "cpp.enable_floating_point_contract_flag": "fast",  # fused multiply-add
    # Only `materialize` writes intermediates to memory: Inductor's heuristics assume pointwise code.
    "realize_opcount_threshold": NEVER,
    "realize_reads_threshold": NEVER,
    "realize_acc_reads_threshold": NEVER,
    "max_pointwise_cat_inputs": 0,
}

PlainMatrix = tuple[Tensor, ...]  # (weight,), (q, scale) or (words, scale) with zero or without: see _matrix


class SurroundedMatrix(NamedTuple):
    """A matrix of Meta's int4 releases: `surrounded`'s arguments, with matrices, not functions."""

    matrix: PlainMatrix
    adaptor: tuple[Tensor, Tensor, float] | None  # A, B and the scale
    factors: Factors | None
    rounds_inputs: bool


Matrix = PlainMatrix | SurroundedMatrix
Norm = tuple[Tensor, float]  # weight, eps


def compile_decode(model: Transformer) -> None:
    """Make a model's decode steps faster, in place; on a CPU those of one row.

    Compiling takes some seconds (int4: half a minute), less if PyTorch's cache on disk has the
    result. If it fails, for example without a C++ compiler, the model stays unchanged and a warning
    is logged. Raises RequestError for a model that is split among processes, or on neither a CPU
    nor CUDA.
    """
    from torch._dynamo.exc import BackendCompilerFailed  # lazily: importing the compiler takes a second
    from torch._inductor.exc import InductorError

    if any(isinstance(module, RowParallelLinear | LogitsForAll) for module in model.modules()):
        raise RequestError("compile works in one process only; leave it out, or start without torchrun")
    device = model.device
    if device.type == "cuda":
        use_fast_kernels(model)
        return compile_cuda_decode(model)
    if device.type != "cpu":
        raise RequestError(f"compile works on the CPU and on CUDA, not on {device.type}; leave it out")
    if not _has_compiler():
        return logger.warning("no C++ compiler (c++, g++ or clang++) found: decoding stays uncompiled")
    with _vectors_probed():
        _install_steps(model)
        logger.info("compiling the decode step: some seconds, half a minute for int4, less the next time")
        try:
            _warm_up(model)
        except (BackendCompilerFailed, InductorError) as error:
            _remove_steps(model)
            cause = str(error).splitlines()[0]
            logger.warning("cannot compile the decode step here (%s): decoding stays uncompiled", cause)


def _install_steps(model: Transformer) -> None:
    """Install the steps, which compile on their first run, and convert matrices to their layout."""
    unpack = torch.compile(_own(int4_layout.matrix), options=OPTIONS, dynamic=True)
    replace_matrices(model, Int4Linear, lambda matrix: PlanarInt4Linear(matrix, unpack))
    replace_matrices(model, Int8Linear, lambda matrix: PiecewiseInt8Linear(matrix) if in_pieces(matrix.shape[1]) else matrix)
    step = torch.compile(_own(_layer_step), options=OPTIONS, dynamic=False)
    head = torch.compile(_own(matvec), options=OPTIONS, dynamic=False)
    for block in model.layers:
        if not any(isinstance(module, Fp8Linear) for module in block.modules()):  # fp8 has no step
            install(block, forward=_FastBlock(block, step))
    install(model.output, forward=_FastOutput(model.output, head))


def _remove_steps(model: Transformer) -> None:
    """Restore model.py's forwards; the matrices keep the layout that they were converted to."""
    for module in (*model.layers, model.output):
        vars(module).pop("forward", None)
    for module in model.modules():
        if isinstance(module, PlanarInt4Linear):
            module.matrix = int4_layout.matrix


def _own(function: Callable) -> Callable:
    """A copy of a function for one model: PyTorch compiles at most eight variants of a function's code.

    A ninth shape would run uncompiled.
    """
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


@contextmanager
def _vectors_probed() -> Iterator[None]:
    """Let Inductor detect vector instructions during the block: it waits for a C++ compiler."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":  # torch.compile returns functions as they are
        yield
        return
    try:
        from torch._inductor.cpu_vec_isa import valid_vec_isa_list
    except ImportError:  # another PyTorch detects them when needed
        yield
        return
    probing = Thread(target=valid_vec_isa_list, daemon=True)
    probing.start()
    try:
        yield
    finally:
        probing.join()


def _warm_up(model: Transformer) -> None:
    """Run a decode step exactly as decoding/loop.py does: any difference would compile it again."""
    cache = new_cache(model, 1, 2 * CACHE_BLOCK)
    tokens = torch.zeros(1, 2, dtype=torch.long, device="cpu")
    with torch.inference_mode():
        model.hidden(tokens, cache)
        with onednn_for(tokens[:, :1], cache.keys.dtype):
            model.logits(model.hidden(tokens[:, :1], cache))


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


class _FastBlock(CompiledForward):
    """Replaces a block's forward: compiled for one token of one row, the block's own otherwise."""

    def __init__(self, block: TransformerBlock, step: Callable):
        self.plain, self.step = block.forward, step
        attention, feed_forward = block.attention, block.feed_forward
        linears = (attention.wq, attention.wk, attention.wv, attention.wo, feed_forward.w1, feed_forward.w2, feed_forward.w3)
        self.matrices = tuple(map(_matrix, linears))
        self.norms = tuple((norm.weight, norm.eps) for norm in (block.attention_norm, block.ffn_norm))

    def __call__(self, x: Tensor, context: Context, layer: int) -> Tensor:
        cache = context.cache
        if x.shape[:2] != (1, 1) or not isinstance(cache, BlockKVCache):
            return self.plain(x, context, layer)
        if cache.longest == 0 or cache.max_seq_len % CACHE_BLOCK:
            return self.plain(x, context, layer)
        blocks, (cos, sin) = cache.blocks(context), context.rotations
        shared = cos[0, 0], sin[0, 0], blocks.mask
        out, k, v = self.step(x[0, 0], *shared, blocks.keys[layer], blocks.values[layer], self.matrices, self.norms)
        cache.write(layer, context.positions, k[None, None], v[None, None])
        return out[None, None]


class _FastOutput(CompiledForward):
    """Replaces the output's forward: compiled for one token, the output's own otherwise."""

    def __init__(self, output: nn.Module, head: Callable):
        self.plain, self.head, self.matrix = output.forward, head, _matrix(output)

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() > x.shape[-1]:
            return self.plain(x)
        return self.head(self.matrix, x.flatten()).view(*x.shape[:-1], -1)


def _matrix(module: nn.Module) -> Matrix:
    """A module's matrix as the tensors that a compiled product takes."""
    if isinstance(module, MetaInt4Linear):
        adaptor = (module.adaptor.a, module.adaptor.b, module.adaptor.scale) if module.adaptor else None
        factors = hadamard_factors(module.shape[1], module.matrix.scale.device) if module.rotates_inputs else None
        return SurroundedMatrix(_plain_matrix(module.matrix), adaptor, factors, module.rounds_inputs)
    return _plain_matrix(module)


def _plain_matrix(module: nn.Module) -> PlainMatrix:
    if isinstance(module, PlanarInt4Linear):
        parts = module.words, module.scale, module.zero
        return tuple(part for part in parts if part is not None)
    if isinstance(module, Int8Matrix):
        return module.q, module.scale
    return (module.get_parameter("weight"),)


def _layer_step(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    keys: Tensor,
    values: Tensor,
    matrices: tuple[Matrix, ...],
    norms: tuple[Norm, Norm],
) -> tuple[Tensor, Tensor, Tensor]:
    """A block for one token: x (D,), keys and values (K, …, 64, hd) -> x (D,), its own k and v (K, hd).

    `mask` (n, 64) is 0 at the slots of the first n blocks that hold a token, else -inf.
    """
    wq, wk, wv, wo, w1, w2, w3 = matrices
    n_kv_heads, head_dim = keys.shape[0], keys.shape[-1]
    h = rms_norm(x, *norms[0])
    q, k, v = (matvec(w, h).view(-1, head_dim) for w in (wq, wk, wv))
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    keys, values = keys[:, : len(mask)], values[:, : len(mask)]
    x = x + matvec(wo, _attend(q.view(n_kv_heads, -1, head_dim), k, v, keys, values, mask))
    h = rms_norm(x, *norms[1])
    return x + matvec(w2, F.silu(matvec(w1, h)) * matvec(w3, h)), k, v


def matvec(matrix: Matrix, x: Tensor) -> Tensor:
    """A matrix times x (K,): (N,) in x's dtype."""
    if not isinstance(matrix, SurroundedMatrix):
        return _product(matrix, x)
    adapted = None if matrix.adaptor is None else partial(_low_rank, *matrix.adaptor)
    return surrounded(x, partial(_product, matrix.matrix), adapted, matrix.factors, matrix.rounds_inputs)


def _low_rank(a: Tensor, b: Tensor, scale: float, x: Tensor) -> Tensor:
    return _product((b,), _product((a,), x)) * scale


def _product(matrix: PlainMatrix, x: Tensor) -> Tensor:
    """A matrix (N, K), or (P, N, K/P) in pieces, times x (K,), summed in float32: (N,) in x's dtype."""
    w, *scale = matrix
    if w.dtype == torch.int32:
        padded = w.shape[0] * w.shape[2] * COLUMNS
        return int4_layout.product(F.pad(x.float(), (0, padded - len(x))), *matrix).to(x.dtype)
    if w.dim() == 2:
        w = w.unflatten(1, (-1, PIECE if in_pieces(w.shape[1]) else w.shape[1])).transpose(0, 1)
    x32 = materialize(x.float()).view(len(w), 1, -1)  # (P, 1, K/P)
    sums = torch.cat([(rows.float() * x32).sum(-1).sum(0) for rows in w.chunk(STREAMS, dim=1)])
    return (sums * scale[0] if scale else sums).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """model.py's rotation (heads, hd) without complex numbers, which Inductor does not compile."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # 2 × (heads, hd/2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


def _attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of one token's q (K, G, hd) to earlier tokens and itself, k and v (K, hd): (K · G · hd,).

    keys and values (K, n, 64, hd) are blocks of the cache; `mask` (n, 64) is 0 where a slot holds a
    token, else -inf. The G heads of a group are computed together: their keys are read and converted once.
    """
    G = q.shape[1]
    q32 = materialize(q.float() * q.shape[-1] ** -0.5)
    keys32 = keys.float()
    seen = torch.where((mask == 0)[..., None], values.float(), 0)  # unused slots may hold a NaN
    scores = torch.stack([(q32[:, g, None, None] * keys32).sum(-1) for g in range(G)], dim=1)  # (K, G, n, 64)
    scores = torch.where(mask == 0, scores, mask)
    own = (q32 * k[:, None].float()).sum(-1)  # (K, G)
    top = torch.maximum(scores.amax((2, 3)), own)
    p, p_own = materialize((scores - top[..., None, None]).exp()), (own - top).exp()
    mixed = torch.stack([(p[:, g, ..., None] * seen).sum(-2) for g in range(G)], dim=1).sum(2)  # (K, G, hd)
    mixed = mixed + p_own[..., None] * v[:, None].float()
    return (mixed / (p.sum((2, 3)) + p_own)[..., None]).to(q.dtype).flatten()
