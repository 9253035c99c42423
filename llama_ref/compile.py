"""A faster decode step, put onto a model from outside: one sequence, one token, each layer one compiled loop over its weights.

With one token at a time a model does little but read its weights, so that a step is as fast as memory. Written as multiply
and sum over each row, a matrix times a vector compiles (torch.compile, Inductor) to just that: a loop that streams the rows.
All layers are of one shape and share one compiled function, which takes their weights as arguments and compiles in seconds.
The plain blocks of model.py stay in place for everything else: prompts and batches.
"""

import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ref.device import fast_for_one_row
from llama_ref.errors import RequestError
from llama_ref.model import Context, KVCache, Transformer, TransformerBlock, rotate
from llama_ref.parallel import SummedLinear
from llama_ref.pipeline import LogitsForAll
from llama_ref.quantization import planes
from llama_ref.quantization.modules import Int4Linear, Int8Matrix
from llama_ref.quantization.planes import COLUMNS, PlanarInt4Linear, held
from llama_ref.quantize import replace_module

STREAMS = 4  # rows read side by side: they share what is loaded of the vector; more were slower
LONG_ROW, BLOCK = 4096, 1024  # a longer row is summed in blocks, which are read in several streams
SHORTEST = 2  # tokens in the cache: a compiler takes a length of 0 or 1 for a case of its own
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
    """Make a model's decode steps of one row faster; changed in place.

    Takes some seconds to compile, fewer where PyTorch's cache on disk has it from an earlier run. Where that does not work,
    without a C++ compiler above all, the model stays as it is and one line on stderr says so. Raises RequestError for a model
    that is divided among processes, or not on the CPU.
    """
    from torch._dynamo.exc import BackendCompilerFailed  # only now: to import the compiler takes a second
    from torch._inductor.exc import InductorError

    from llama_ref.terminal import note

    if any(isinstance(module, SummedLinear | LogitsForAll) for module in model.modules()):
        raise RequestError("compile is for one process; leave it out, or start without torchrun")
    if model.norm.weight.device.type != "cpu":
        raise RequestError("compile is for the CPU so far; leave it out, or take device cpu")
    if not _has_compiler():
        note("no C++ compiler (c++, g++ or clang++) was found: decoding stays uncompiled")
        return
    for name in [name for name, module in model.named_modules() if isinstance(module, Int4Linear)]:
        replace_module(model, name, PlanarInt4Linear(model.get_submodule(name)))
    step = torch.compile(_layer_step, options=OPTIONS, dynamic=False)
    head = torch.compile(matvec, options=OPTIONS, dynamic=False)
    for block in model.layers:
        block.forward = _FastBlock(block, step)
    model.output.forward = _FastOutput(model.output, head)
    note("compiling the decode step: some seconds, fewer the next time")
    try:
        _warm_up(model)
    except (BackendCompilerFailed, InductorError) as error:
        for module in (*model.layers, model.output):
            del module.forward
        note(f"it cannot be compiled here ({str(error).splitlines()[0]}): decoding stays uncompiled")


def _warm_up(model: Transformer) -> None:
    """A step of one row just as loop.py has them: with what differs, another would be compiled."""
    norm = model.norm.weight
    cache = KVCache(model.args, 1, SHORTEST + 1, dtype=norm.dtype, device=norm.device)
    tokens = torch.zeros(1, SHORTEST, dtype=torch.long)
    with torch.inference_mode():
        model.hidden(tokens, cache)
        with fast_for_one_row(tokens[:, :1], norm.dtype):
            model.logits(model.hidden(tokens[:, :1], cache))


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


class _FastBlock:
    """In place of a block's forward: the compiled step for one token of one row, the block's own for all else."""

    def __init__(self, block: TransformerBlock, step: Callable):
        self.plain, self.step = block.forward, step
        attention, feed_forward = block.attention, block.feed_forward
        linears = (attention.wq, attention.wk, attention.wv, attention.wo, feed_forward.w1, feed_forward.w2, feed_forward.w3)
        self.matrices = tuple(map(_matrix, linears))
        self.norms = tuple((norm.weight, norm.eps) for norm in (block.attention_norm, block.ffn_norm))

    def __call__(self, x: Tensor, context: Context, layer: int) -> Tensor:
        cache = context.cache
        if x.shape[:2] != (1, 1) or cache is None or cache.longest < SHORTEST:
            return self.plain(x, context, layer)
        keys, values = cache.keys[layer, 0], cache.values[layer, 0]  # (K, max_seq_len, hd)
        seen = x.new_empty(cache.longest)  # its length is what counts: a number would be compiled for itself alone
        for tensor, dim in ((keys, 1), (values, 1), (seen, 0)):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
        cos, sin = context.rotations
        out, k, v = self.step(x[0, 0], cos[0, 0], sin[0, 0], keys, values, seen, self.matrices, self.norms)
        cache.extend(layer, context.positions, k[None, None], v[None, None])
        return out[None, None]


class _FastOutput:
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
    x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, seen: Tensor, matrices: tuple[Matrix, ...], norms: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    """A block for one token: x (D,), keys and values (K, …, hd), of which the first `len(seen)` count -> x, its own k and v."""
    wq, wk, wv, wo, w1, w2, w3 = matrices
    n_kv_heads, _, head_dim = keys.shape
    h = _norm(x, *norms[0])
    q, k, v = (matvec(w, h).view(-1, head_dim) for w in (wq, wk, wv))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    keys, values = keys[:, : len(seen)], values[:, : len(seen)]  # (K, S, hd)
    x = x + matvec(wo, _attend(q.view(n_kv_heads, -1, head_dim), k, v, keys, values))
    h = _norm(x, *norms[1])
    return x + matvec(w2, F.silu(matvec(w1, h)) * matvec(w3, h)), k, v


def matvec(matrix: Matrix, x: Tensor) -> Tensor:
    """A matrix (N, K) times x (K,), summed in float32: (N,) in x's dtype."""
    if len(matrix) == 3:
        padded = matrix[0].shape[1] * COLUMNS
        return planes.product(*matrix, F.pad(x.float(), (0, padded - len(x)))).to(x.dtype)
    w, *scale = matrix
    x32 = held(x.float())
    if w.shape[1] > LONG_ROW and w.shape[1] % BLOCK == 0:
        w, x32 = w.view(len(w), -1, BLOCK), x32.view(-1, BLOCK)
        sums = torch.cat([(half.float() * x32).sum(-1).sum(-1) for half in w.chunk(2)])
    else:
        sums = torch.cat([(rows.float() * x32).sum(-1) for rows in w.chunk(STREAMS)])
    return (sums * scale[0] if scale else sums).to(x.dtype)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight


def _attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one token's q (K, G, hd) to what came before, keys and values (K, S, hd), and to itself, k and v (K, hd)."""
    q32 = held(q.float() * q.shape[-1] ** -0.5)
    scores = (q32[:, :, None] * keys[:, None].float()).sum(-1)  # (K, G, S)
    own = (q32 * k[:, None].float()).sum(-1, keepdim=True)  # (K, G, 1)
    top = torch.maximum(scores.amax(-1, keepdim=True), own)
    p, p_own = held((scores - top).exp()), (own - top).exp()
    mixed = (p[..., None] * values[:, None].float()).sum(-2) + p_own * v[:, None].float()  # (K, G, hd)
    return (mixed / (p.sum(-1, keepdim=True) + p_own)).to(q.dtype).flatten()
