"""A faster decode step, put onto a model from outside: one sequence, one token, each layer one compiled loop over its weights.

With one token at a time a model does little but read its weights, so that a step is as fast as memory. Written as multiply
and sum over each row, a matrix times a vector compiles (torch.compile, Inductor) to just that: a loop that streams the rows.
All layers are of one shape and share one compiled function, which takes their weights as arguments and compiles in seconds.
The plain blocks of model.py stay in place for everything else: prompts and batches.
"""

import logging
import shutil
from collections.abc import Callable
from threading import Thread

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ref.compiled import int4_layout
from llama_ref.compiled.caches import CACHE_BLOCK, new_cache
from llama_ref.compiled.cuda import compile_cuda_decode
from llama_ref.compiled.forward import CompiledForward
from llama_ref.compiled.int4_layout import COLUMNS, PlanarInt4Linear, held
from llama_ref.compiled.int8_layout import PIECE, PiecewiseInt8Linear, in_pieces
from llama_ref.device import fast_for_one_row
from llama_ref.errors import RequestError
from llama_ref.kv_cache import KVCache
from llama_ref.memory import keep_scratch_memory
from llama_ref.model import Context, Transformer, TransformerBlock, rotate
from llama_ref.parallel.pipeline import LogitsForAll
from llama_ref.parallel.tensor import RowParallelLinear
from llama_ref.quantization.apply import replace_matrices, use_fast_kernels
from llama_ref.quantization.linear import Int4Linear, Int8Linear, Int8Matrix

logger = logging.getLogger(__name__)

STREAMS = 4  # rows read side by side: they share what is loaded of the vector; more were slower
FEWEST_BLOCKS = 2  # of the cache: a compiler takes a length of 0 or 1 for a case of its own
NEVER = 10**6
OPTIONS = {
    "cpp.enable_floating_point_contract_flag": "fast",  # fused multiply-add
    # Nothing within a row's loop is put into memory but what `held` says: Inductor's guesses are for pointwise code.
    "realize_opcount_threshold": NEVER,
    "realize_reads_threshold": NEVER,
    "realize_acc_reads_threshold": NEVER,
    "max_pointwise_cat_inputs": 0,
}

Matrix = tuple[Tensor, ...]  # (weight,), (q, scale) or (words, scale, zero): see _matrix


def compile_decode(model: Transformer) -> None:
    """Make a model's decode steps faster, on a CPU those of one row; changed in place.

    Takes some seconds to compile, fewer where PyTorch's cache on disk has it from an earlier run. Where that does not work,
    without a C++ compiler above all, the model stays as it is and one line on stderr says so. The whole process keeps up to 64
    MB of freed memory from then on (memory.py). Raises RequestError for a model that is divided among processes, or on neither
    a CPU nor CUDA.
    """
    from torch._dynamo.exc import BackendCompilerFailed  # only now: to import the compiler takes a second
    from torch._inductor.exc import InductorError

    if any(isinstance(module, RowParallelLinear | LogitsForAll) for module in model.modules()):
        raise RequestError("compile is for one process; leave it out, or start without torchrun")
    device = model.norm.weight.device
    if device.type == "cuda":
        use_fast_kernels(model)  # which are recorded as they are; a CPU's matrices get layouts of their own
        return compile_cuda_decode(model)
    if device.type != "cpu":
        raise RequestError(f"compile is for the CPU and for CUDA, not for {device.type}; leave it out")
    if not _has_compiler():
        return logger.warning("no C++ compiler (c++, g++ or clang++) was found: decoding stays uncompiled")
    _probe_vectors()
    unpack = torch.compile(int4_layout.matrix, options=OPTIONS, dynamic=True)
    replace_matrices(model, Int4Linear, lambda matrix: PlanarInt4Linear(matrix, unpack))
    replace_matrices(model, Int8Linear, lambda matrix: PiecewiseInt8Linear(matrix) if in_pieces(matrix.shape[1]) else matrix)
    step = torch.compile(_layer_step, options=OPTIONS, dynamic=False)
    head = torch.compile(matvec, options=OPTIONS, dynamic=False)
    for block in model.layers:
        block.forward = _FastBlock(block, step)
    model.output.forward = _FastOutput(model.output, head)
    logger.info("compiling the decode step: some seconds, fewer the next time")
    try:
        _warm_up(model)
    except (BackendCompilerFailed, InductorError) as error:
        for module in (*model.layers, model.output):
            del module.forward
        for module in model.modules():
            if isinstance(module, PlanarInt4Linear):
                module.matrix = int4_layout.matrix
        logger.warning("it cannot be compiled here (%s): decoding stays uncompiled", str(error).splitlines()[0])
    else:
        keep_scratch_memory()


def _probe_vectors() -> None:
    """Let Inductor find out beside the rest which vector instructions work here: it starts processes for it, and waits."""
    try:
        from torch._inductor.cpu_vec_isa import valid_vec_isa_list
    except ImportError:
        return  # another version: it will find out when it needs to
    Thread(target=valid_vec_isa_list, daemon=True).start()


def _warm_up(model: Transformer) -> None:
    """A step of one row just as decoding/loop.py has them: with what differs, another would be compiled."""
    cache = new_cache(model, 1, 2 * CACHE_BLOCK)
    tokens = torch.zeros(1, 2, dtype=torch.long)
    with torch.inference_mode():
        model.hidden(tokens, cache)
        with fast_for_one_row(tokens[:, :1], cache.keys.dtype):
            model.logits(model.hidden(tokens[:, :1], cache))


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


class _FastBlock(CompiledForward):
    """In place of a block's forward: the compiled step for one token of one row, the block's own for all else."""

    def __init__(self, block: TransformerBlock, step: Callable):
        self.plain, self.step = block.forward, step
        attention, feed_forward = block.attention, block.feed_forward
        linears = (attention.wq, attention.wk, attention.wv, attention.wo, feed_forward.w1, feed_forward.w2, feed_forward.w3)
        self.matrices = tuple(map(_matrix, linears))
        self.norms = tuple((norm.weight, norm.eps) for norm in (block.attention_norm, block.ffn_norm))

    def __call__(self, x: Tensor, context: Context, layer: int) -> Tensor:
        cache = context.cache
        if x.shape[:2] != (1, 1) or cache is None or cache.longest == 0 or cache.max_seq_len % CACHE_BLOCK:
            return self.plain(x, context, layer)
        if layer == 0:
            context.seen = _Seen(cache, context)
        seen = context.seen
        out, k, v = self.step(x[0, 0], *seen.shared, seen.keys[layer], seen.values[layer], self.matrices, self.norms)
        cache.write(layer, context.positions, k[None, None], v[None, None])
        return out[None, None]


class _Seen:
    """What a token's steps look at: each layer's blocks of the cache, and what all layers share."""

    def __init__(self, cache: KVCache, context: Context):
        self.keys, self.values = (
            all_[:, 0].unflatten(2, (-1, CACHE_BLOCK)).unbind() for all_ in (cache.keys, cache.values)
        )  # n_layers × (K, …, 64, hd)
        n_blocks = max(FEWEST_BLOCKS, -(-cache.longest // CACHE_BLOCK))
        # Made once: to compare places costs more in every layer and head.
        mask = cache.keys.new_zeros(n_blocks * CACHE_BLOCK, dtype=torch.float32)
        mask[cache.longest :] = -torch.inf
        mask = mask.view(n_blocks, CACHE_BLOCK)
        for tensor, dim in ((mask, 0), *((tensor, 1) for tensor in (*self.keys, *self.values))):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
        cos, sin = context.rotations
        self.shared = cos[0, 0], sin[0, 0], mask


class _FastOutput(CompiledForward):
    """In place of the output's forward, likewise."""

    def __init__(self, output: nn.Module, head: Callable):
        self.plain, self.head, self.matrix = output.forward, head, _matrix(output)

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() > x.shape[-1]:
            return self.plain(x)
        return self.head(self.matrix, x.flatten()).view(*x.shape[:-1], -1)


def _matrix(module: nn.Module) -> Matrix:
    """The tensors that a compiled product takes."""
    if isinstance(module, PlanarInt4Linear):
        return module.words, module.scale, module.zero
    if isinstance(module, Int8Matrix):
        return module.q, module.scale
    return (module.weight,)


def _layer_step(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    keys: Tensor,
    values: Tensor,
    matrices: tuple[Matrix, ...],
    norms: tuple,
) -> tuple[Tensor, Tensor, Tensor]:
    """A block for one token: x (D,), keys and values (K, …, 64, hd) -> x, its own k and v (K, hd).

    Of the keys and values those places in the first n blocks count where `mask` (n, 64) is 0.
    """
    wq, wk, wv, wo, w1, w2, w3 = matrices
    n_kv_heads, head_dim = keys.shape[0], keys.shape[-1]
    h = _norm(x, *norms[0])
    q, k, v = (matvec(w, h).view(-1, head_dim) for w in (wq, wk, wv))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    keys, values = keys[:, : len(mask)], values[:, : len(mask)]
    x = x + matvec(wo, _attend(q.view(n_kv_heads, -1, head_dim), k, v, keys, values, mask))
    h = _norm(x, *norms[1])
    return x + matvec(w2, F.silu(matvec(w1, h)) * matvec(w3, h)), k, v


def matvec(matrix: Matrix, x: Tensor) -> Tensor:
    """A matrix (N, K), or (P, N, K/P) in pieces, times x (K,), summed in float32: (N,) in x's dtype."""
    if len(matrix) == 3:
        padded = matrix[0].shape[0] * matrix[0].shape[2] * COLUMNS
        return int4_layout.product(*matrix, F.pad(x.float(), (0, padded - len(x)))).to(x.dtype)
    w, *scale = matrix
    if w.dim() == 2:
        w = w.unflatten(1, (-1, PIECE if in_pieces(w.shape[1]) else w.shape[1])).transpose(0, 1)
    x32 = held(x.float()).view(len(w), 1, -1)  # (P, 1, K/P)
    sums = torch.cat([(rows.float() * x32).sum(-1).sum(0) for rows in w.chunk(STREAMS, dim=1)])
    return (sums * scale[0] if scale else sums).to(x.dtype)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight


def _attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of one token's q (K, G, hd) to what came before and to itself, k and v (K, hd): (K · G · hd,).

    keys and values (K, n, 64, hd) are blocks of the cache, small enough to stay in the nearest cache of the processor while
    they are gone over; `mask` (n, 64) is 0 where a place counts, else -inf. The G heads of a group go side by side: what they
    share is read and converted once.
    """
    G = q.shape[1]
    q32 = held(q.float() * q.shape[-1] ** -0.5)
    keys32 = keys.float()
    seen = torch.where((mask == 0)[..., None], values.float(), 0)  # where nothing counts, memory may hold a NaN
    scores = torch.stack([(q32[:, g, None, None] * keys32).sum(-1) for g in range(G)], dim=1)  # (K, G, n, 64)
    scores = torch.where(mask == 0, scores, mask)
    own = (q32 * k[:, None].float()).sum(-1)  # (K, G)
    top = torch.maximum(scores.amax((2, 3)), own)
    p, p_own = held((scores - top[..., None, None]).exp()), (own - top).exp()
    mixed = torch.stack([(p[:, g, ..., None] * seen).sum(-2) for g in range(G)], dim=1).sum(2)  # (K, G, hd)
    mixed = mixed + p_own[..., None] * v[:, None].float()
    return (mixed / (p.sum((2, 3)) + p_own)[..., None]).to(q.dtype).flatten()
