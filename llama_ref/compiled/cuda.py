"""Fast passes on CUDA, put onto a model from outside: fewer kernels, and for a few tokens all of them launched by one call.

For one token a GPU needs less time than Python takes to ask for a thousand kernels. Two things are done about that:

* A layer is a handful of launches: wq, wk and wv are joined into one matrix and so are w1 and w3 (the model's own weights
  become views of the joined ones, so nothing is held twice), and what lies between the products is one kernel each
  (triton_elementwise.py).
* The whole pass over a few tokens, output matrix included, is captured as a CUDA graph and replayed. Nothing in a graph may
  change from token to token: ids and lengths lie in tensors that are filled before each replay, and attention finds the rows'
  lengths there. Where it cannot (without Triton), it looks, masked, at a part of the cache that stays as wide as it is for many
  tokens, a power of two: a text that grows needs few graphs.

The cache's addresses are in a graph too, and every call of the generation loop brings a cache of its own. A graph is kept under
those addresses, not under the cache: PyTorch's allocator gives a new cache the memory of the last one of its size, and the next
call finds its graphs made. Nothing is copied, no cache is kept alive.

Graphs share the memory for what they compute on the way, which is right as long as they are replayed on one CUDA stream.
"""

import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from llama_ref.compiled.caches import new_cache
from llama_ref.compiled.cuda_cache import FlashKVCache, FlashLengths
from llama_ref.compiled.cuda_ops import joined, linear, norm, norm_linear, norm_query, norm_swiglu
from llama_ref.compiled.forward import CompiledForward
from llama_ref.compiled.triton_probe import uses_triton
from llama_ref.device import is_out_of_memory
from llama_ref.kv_cache import KVCache, group_mask, grouped_attention
from llama_ref.model import Transformer, TransformerBlock, rope_frequencies, rope_rotations

logger = logging.getLogger(__name__)

SMALLEST_WIDTH = 256  # tokens
WARM_UP_TOKENS = 128  # room for the passes that compile the kernels
MOST_GRAPHS = 24  # the least recently used goes first; a text of 128k tokens comes to 10
KERNEL_HEAD_DIMS = (16, 32, 64, 128, 256)  # that triton_attention.py takes
# Tokens of a row in a captured pass; drafts are padded to the next. More are launched one by one: they take longer than that.
PASS_LENGTHS = (1, 4, 8, 13)

Pass = Callable[[Tensor, Tensor], Tensor]  # ids (B, T) and lengths (B,) -> logits (B, T, V)
Capture = Callable[[Pass, Tensor, Tensor], Callable[[], Tensor]]  # a pass and its inputs -> what does it again, on these


def compile_cuda_decode(model: Transformer) -> None:
    """Make a model on a CUDA device faster; changed in place.

    Takes a second or two, longer the first time that Triton compiles the kernels on a machine. Without Triton the kernels are
    PyTorch's own, more and smaller.
    """
    fast = FastPasses(model, CudaGraphs(model.norm.weight.device))
    logger.info("preparing the decode step: a few seconds, longer the first time")
    try:
        fast.warm_up()
    except Exception as error:  # of many kinds, Triton's own among them
        logger.warning("it cannot be prepared here (%s): decoding stays uncompiled", _first_line(error))
    else:
        model.hidden, model.forward = FastHidden(fast), FastForward(fast)


class FastHidden(CompiledForward):
    """In place of `Transformer.hidden`: prompts."""

    def __init__(self, fast: "FastPasses"):
        self.fast = fast

    def __call__(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """As `Transformer.hidden`."""
        if cache is None:
            return Transformer.hidden(self.fast.model, tokens, cache)
        return self.fast.hidden(tokens, cache)


class FastForward(CompiledForward):
    """In place of `Transformer.forward`: decode steps and drafts, captured where they are short enough."""

    is_asynchronous = True

    def __init__(self, fast: "FastPasses"):
        self.fast = fast

    def __call__(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """As `Transformer.forward`."""
        if cache is None:
            return Transformer.forward(self.fast.model, tokens, cache)
        return self.fast.logits(tokens, cache)

    @property
    def recordings(self) -> "OrderedDict[tuple, CapturedPass]":
        return self.fast.graphs

    @property
    def record_seconds(self) -> float:
        return self.fast.capture_seconds


class FastPasses:
    """A model's passes in fused layers, and the graphs captured of them."""

    def __init__(self, model: Transformer, capture: Capture):
        self.model = weakref.proxy(model)  # which holds this: GPU memory must not wait for Python to find the circle
        self.layers = [FusedLayer(block) for block in model.layers]
        self.angles = Angles(model)
        self.capture: Capture | None = capture  # None: it failed
        self.graphs: OrderedDict[tuple, CapturedPass] = OrderedDict()
        self.capture_seconds = 0.0
        self.cleared: weakref.WeakSet[KVCache] = weakref.WeakSet()
        self.lock = threading.Lock()

    # ---- passes that are launched kernel by kernel

    @torch.inference_mode()
    def hidden(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """The last layer's normed output (B, T, D) for new ids (B, T); the cache grows by T tokens."""
        self._clear(cache)
        cache.make_room(tokens.shape[1])
        x = self._layers(tokens, cache.lengths, cache, cache.longest + tokens.shape[1], cache.longest)
        cache.advance(tokens.shape[1])
        return norm(x, self.model.norm).view(*tokens.shape, -1)

    def _layers(self, tokens: Tensor, lengths: Tensor, cache: KVCache, width: int, longest: int = 0) -> Tensor:
        """The last layer's output (B · T, D). No row comes to more than `width` tokens, the new ones included.

        `longest`: tokens before these, of the longest row, for attention of prompts.
        """
        B, T = tokens.shape
        positions = (lengths[:, None] + torch.arange(T, device=tokens.device)).flatten()  # (N,)
        cos, sin = self.angles.up_to(cache.max_seq_len)
        look = attention_to(cache, lengths, positions, T, width, longest)
        x = self.model.tok_embeddings(tokens.flatten())  # (N, D)
        for i, layer in enumerate(self.layers):
            keys, values = cache.keys[i], cache.values[i]  # (B, K, S, hd)
            q = layer.query(x, positions, cos, sin, keys, values)  # (N, H, hd)
            x = layer.rest(x, look(i, q.view(B, T, *q.shape[1:])).flatten(0, 1).flatten(1))
        return x

    # ---- passes that are captured

    @torch.inference_mode()
    def logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """float32 logits (B, T, V) for new ids (B, T); the cache grows by T tokens."""
        T = tokens.shape[1]
        padded = next((n for n in PASS_LENGTHS if n >= T), None)
        if self.capture is None or padded is None or cache.longest + padded > cache.max_seq_len:
            return self.model.logits(self.hidden(tokens, cache))
        self._clear(cache)
        try:
            run = self._captured(tokens, padded, cache)
        except RuntimeError as error:  # nothing is lost: what the pass wrote, the plain one writes again
            self._captures_failed(error)
            return self.model.logits(self.hidden(tokens, cache))
        logits = run(tokens, cache.lengths)
        cache.advance(T)
        return logits

    def _captured(self, tokens: Tensor, T: int, cache: KVCache) -> "CapturedPass":
        with self.lock:
            width = cache.max_seq_len if self._reads_lengths(cache, T) else next_width(cache, T)
            key = (cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.shape, T, width)
            if key not in self.graphs:
                try:
                    self.graphs[key] = self._new(tokens, T, cache, width)
                except RuntimeError as error:
                    if not is_out_of_memory(error) or not self.graphs:
                        raise
                    self.graphs.clear()  # they may hold what is missing
                    self.graphs[key] = self._new(tokens, T, cache, width)
                if len(self.graphs) > MOST_GRAPHS:
                    self.graphs.popitem(last=False)
            self.graphs.move_to_end(key)
            return self.graphs[key]

    def _reads_lengths(self, cache: KVCache, T: int) -> bool:
        """Whether attention goes by the lengths on the device alone, so that one graph serves all of them."""
        return not cache.needs_mask if T > 1 else _has_kernel(cache)

    def _new(self, tokens: Tensor, T: int, cache: KVCache, width: int) -> "CapturedPass":
        begun, B = time.perf_counter(), len(tokens)

        def run(tokens: Tensor, lengths: Tensor) -> Tensor:
            x = self._layers(tokens, lengths, cache, width)
            return norm_linear(x, self.model.norm, self.model.output).float().view(B, T, -1)

        ids = torch.nn.functional.pad(tokens, (0, T - tokens.shape[1]))  # the tokens themselves: capturing runs the pass once
        made = CapturedPass(self.capture, run, ids, cache.lengths.clone(), self.angles.up_to(cache.max_seq_len))
        self.capture_seconds += time.perf_counter() - begun
        return made

    def _captures_failed(self, error: RuntimeError) -> None:
        if is_out_of_memory(error):
            return  # this call is launched kernel by kernel, the next may be luckier
        logger.warning("a decode step cannot be captured here (%s): its kernels are launched one by one", _first_line(error))
        self.capture = None

    def _clear(self, cache: KVCache) -> None:
        """Where attention is masked, a NaN that memory was left with would count all the same."""
        if cache.needs_mask and cache not in self.cleared:
            cache.keys[:, :, :, cache.longest :] = cache.values[:, :, :, cache.longest :] = 0
            self.cleared.add(cache)

    def warm_up(self) -> None:
        """Have every kernel compiled now, a prompt's, a token's, a draft's and a batch's: none is in the middle of a text."""
        device = self.model.norm.weight.device
        for B, prompts, passes in ((1, (17, 33, 65), PASS_LENGTHS), (2, (), (1,))):
            cache = new_cache(self.model, B, WARM_UP_TOKENS)
            for T in prompts + passes:
                tokens = torch.zeros(B, T, dtype=torch.long, device=device)
                self.logits(tokens, cache)
                cache.set_lengths([1] * B)
        self.graphs.clear()
        self.capture_seconds = 0.0


class FusedLayer:
    """A block with wq, wk, wv and w1, w3 joined; the block's own matrices become views of the joined ones."""

    def __init__(self, block: TransformerBlock):
        attention, feed_forward = block.attention, block.feed_forward
        self.wqkv = joined(attention.wq, attention.wk, attention.wv)
        self.wo = attention.wo
        self.w13 = joined(feed_forward.w1, feed_forward.w3)
        self.w2 = feed_forward.w2
        self.attention_norm, self.ffn_norm = block.attention_norm, block.ffn_norm

    def query(self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Rotated queries (N, H, hd) of x (N, D); its keys and values are written to the layer's cache."""
        return norm_query(x, self.attention_norm, self.wqkv, positions, cos, sin, keys, values)

    def rest(self, x: Tensor, heads: Tensor) -> Tensor:
        """The block's output (N, D) from its input x and what its heads (N, H · hd) gathered."""
        x = linear(heads, self.wo, add=x)
        hidden = norm_swiglu(x, self.ffn_norm, self.w13)  # (N, F)
        return linear(hidden, self.w2, add=x)


class Angles:
    """Cosines and sines of every position, made once and for as many positions as a cache has."""

    def __init__(self, model: Transformer):
        self.args, self.device = model.args, model.norm.weight.device
        self.tables: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def up_to(self, n_positions: int) -> tuple[Tensor, Tensor]:
        """Two float32 tables (at least n_positions, hd/2). Older tables stay valid for graphs that read them."""
        if len(self.tables[0]) < n_positions:
            positions = torch.arange(n_positions, device=self.device)[None]
            cos, sin = rope_rotations(positions, rope_frequencies(self.args, self.device))  # (1, S, 1, hd/2)
            self.tables = cos[0, :, 0].contiguous(), sin[0, :, 0].contiguous()
        return self.tables


class Looks(Protocol):
    def __call__(self, layer: int, q: Tensor) -> Tensor:
        """Attention of a layer's queries (B, T, H, hd) to a cache: the same shape."""
        ...


def attention_to(cache: KVCache, lengths: Tensor, positions: Tensor, T: int, width: int, longest: int) -> Looks:
    """Attention for T new tokens a row at `positions` (N,), after `lengths` (B,) others, of a cache's first `width` tokens."""
    if T == 1 and _has_kernel(cache):
        from llama_ref.compiled.triton_attention import attend_one  # only now: it imports Triton

        return lambda layer, q: attend_one(q[:, 0], cache.keys[layer], cache.values[layer], lengths)[:, None]
    if isinstance(cache, FlashKVCache):
        at = FlashLengths.of(lengths, T, cache.max_seq_len, width)
        return lambda layer, q: cache.attend_piece(layer, q, at, longest)
    visible = torch.arange(width, device=positions.device) <= positions.view(-1, T)[:, :, None]  # (B, T, S)

    def masked(layer: int, q: Tensor) -> Tensor:
        keys, values = cache.read(layer, width)  # (B, S, K, hd)
        return grouped_attention(q, keys, values, group_mask(visible, q.shape[2] // keys.shape[2]))

    return masked


def _has_kernel(cache: KVCache) -> bool:
    """Whether `attend_one` takes the cache."""
    return cache.keys.shape[-1] in KERNEL_HEAD_DIMS and uses_triton(cache.keys)


class CapturedPass:
    """A captured pass with tensors of its own for what goes in. `kept`: what else it reads must stay where it is."""

    def __init__(self, capture: Capture, run: Pass, tokens: Tensor, lengths: Tensor, kept: tuple[Tensor, ...]):
        self.tokens, self.lengths, self.kept = tokens, lengths, kept
        self.run = capture(run, self.tokens, self.lengths)

    def __call__(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, T, V) of ids (B, T); they may be fewer a row than were captured."""
        T = tokens.shape[1]
        self.tokens[:, :T].copy_(tokens)
        self.lengths.copy_(lengths)
        return self.run()[:, :T].clone()  # the next replay writes to the same place


class CudaGraphs:
    """Captures passes as CUDA graphs, which share the memory for what they compute on the way."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Pass, tokens: Tensor, lengths: Tensor) -> Callable[[], Tensor]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        with torch.cuda.device(self.device):
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                out = run(tokens, lengths)  # once uncaptured: what is compiled, chosen and loaded only once must be by now
            current.wait_stream(self.stream)
            # Other threads may use the device meanwhile. `out` is outside of the shared memory: no other graph overwrites it.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                out.copy_(run(tokens, lengths))

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def next_width(cache: KVCache, n_tokens: int) -> int:
    """How much of a cache the next pass may look at: the first power of two that has room for `n_tokens` more, or all."""
    return min(max(SMALLEST_WIDTH, 1 << (cache.longest + n_tokens - 1).bit_length()), cache.max_seq_len)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
