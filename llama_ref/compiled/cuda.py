"""Fast forward passes on CUDA: fused layers, and CUDA graphs for passes of a few tokens.

A GPU runs a pass over one token faster than Python can launch its thousand kernels. Two remedies:

* A layer is a handful of launches. wq, wk and wv are joined into one matrix, and so are w1 and w3 (the
  model's own weights become views of the joined ones, so nothing is stored twice); everything between
  two products is one kernel (triton/elementwise.py).
* The whole pass over a few tokens, output matrix included, is captured as a CUDA graph and replayed.
  Nothing in a graph may change between tokens: ids and lengths are tensors that are filled before
  each replay, and attention reads the rows' lengths from there. Without Triton it cannot: attention
  is then masked, over the first 2ⁿ tokens of the cache, so that a growing text needs few graphs.

A graph also contains the cache's addresses, and every call of the generation loop makes a new cache.
Graphs are stored by address, not by cache: PyTorch's allocator gives a new cache the memory of the
previous one of its size, so the next call reuses the captured graphs. Nothing is copied, and no cache
is kept alive.

Graphs share the memory of intermediate results, which is safe while they replay on one CUDA stream.
"""

import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor

from llama_ref.compiled.caches import new_cache
from llama_ref.compiled.cuda_cache import FlashKVCache, FlashLengths
from llama_ref.compiled.cuda_ops import joined, linear, log_normalizer, norm, norm_linear, norm_query, norm_swiglu
from llama_ref.compiled.forward import CompiledForward, install
from llama_ref.compiled.triton.probe import uses_triton
from llama_ref.device import is_out_of_memory
from llama_ref.kv_cache import ImageKeys, KVCache, group_mask, grouped_attention
from llama_ref.model import Cache, Transformer, TransformerBlock, rope_frequencies, rope_rotations
from llama_ref.vision import CrossAttentionBlock, VisionTransformer

logger = logging.getLogger(__name__)

SMALLEST_WIDTH = 256  # tokens
WARM_UP_TOKENS = 128  # cache size of the passes that compile the kernels
MOST_GRAPHS = 24  # then the least recently used is dropped; a text of 128k tokens needs 10
KERNEL_HEAD_DIMS = (16, 32, 64, 128, 256)  # those of triton/attention.py
# Tokens per row in a captured pass; drafts are padded to the next length. Longer passes are not
# captured: they take longer than launching their kernels.
PASS_LENGTHS = (1, 4, 8, 13)

Pass = Callable[[Tensor, Tensor], Tensor]  # ids (B, T) and lengths (B,) -> logits (B, T, V)
Capture = Callable[[Pass, Tensor, Tensor], Callable[[], Tensor]]  # a pass and its inputs -> its replay


def compile_cuda_decode(model: Transformer) -> None:
    """Make a model on a CUDA device faster, in place.

    Takes a second or two, longer when Triton compiles the kernels for the first time on a machine.
    Without Triton it runs PyTorch's kernels, which are smaller and more numerous.
    """
    fast = FastPasses(model, CudaGraphs(model.device))
    logger.info("preparing the decode step: a few seconds, longer the first time")
    try:
        fast.warm_up()
    except Exception as error:  # of many types, Triton's among them
        logger.warning("cannot prepare the decode step here (%s): decoding stays uncompiled", _first_line(error))
    else:
        install(model, hidden=FastHidden(fast), forward=FastForward(fast))


class FastHidden(CompiledForward):
    """Replaces `Transformer.hidden`, for prompts."""

    def __init__(self, fast: "FastPasses"):
        self.fast = fast

    def __call__(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """As `Transformer.hidden`."""
        if not isinstance(cache, KVCache):
            return Transformer.hidden(self.fast.model, tokens, cache)
        return self.fast.hidden(tokens, cache)


class FastForward(CompiledForward):
    """Replaces `Transformer.forward`, for decode steps and drafts; captured if short enough."""

    is_asynchronous = True

    def __init__(self, fast: "FastPasses"):
        self.fast = fast

    def __call__(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """As `Transformer.forward`."""
        if not isinstance(cache, KVCache):
            return Transformer.forward(self.fast.model, tokens, cache)
        return self.fast.logits(tokens, cache)

    @property
    def recordings(self) -> "OrderedDict[tuple, CapturedPass]":
        return self.fast.graphs

    @property
    def record_seconds(self) -> float:
        return self.fast.capture_seconds


class FastPasses:
    """A model's forward passes in fused layers, and the graphs captured from them."""

    def __init__(self, model: Transformer, capture: Capture):
        # Weak, as the model refers to this object: a cycle would keep its GPU memory until the next
        # garbage collection.
        self.model = cast(Transformer, weakref.proxy(model))
        self.layers = [FusedLayer(block) for block in model.layers]
        # By the layer that follows.
        self.cross_layers: dict[int, tuple[int, CrossAttentionBlock]] = {}
        if isinstance(model, VisionTransformer):
            self.cross_layers = dict(zip(model.cross_layers, enumerate(model.cross_attention_layers), strict=True))
        self.angles = Angles(model)
        self.capture: Capture | None = capture  # None once capturing has failed
        self.graphs: OrderedDict[tuple, CapturedPass] = OrderedDict()
        self.capture_seconds = 0.0
        self.cleared: weakref.WeakSet[KVCache] = weakref.WeakSet()
        self.lock = threading.Lock()

    # ---- launched kernel by kernel

    @torch.inference_mode()
    def hidden(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """The last layer's normed output (B, T, D) for new ids (B, T); the cache grows by T tokens."""
        self._clear(cache)
        cache.make_room(tokens.shape[1])
        x = self._layers(tokens, cache.lengths, cache, cache.longest + tokens.shape[1], cache.longest)
        cache.advance(tokens.shape[1])
        return norm(x, self.model.norm).view(*tokens.shape, -1)

    def _layers(self, tokens: Tensor, lengths: Tensor, cache: KVCache, width: int, longest: int = 0) -> Tensor:
        """The last layer's output (B · T, D). No row has more than `width` tokens, new ones included.

        `longest`: earlier tokens of the longest row, for attention of prompts.
        """
        B, T = tokens.shape
        positions = (lengths[:, None] + torch.arange(T, device=tokens.device)).flatten()  # (N,)
        cos, sin = self.angles.up_to(cache.max_seq_len)
        attention = attention_to(cache, lengths, positions, T, width, longest)
        look = self._looks_at(cache.images, positions.view(B, T))
        x = self.model.embed(tokens.flatten())  # (N, D)
        for i, layer in enumerate(self.layers):
            x = look(i, x)
            keys, values = cache.keys[i], cache.values[i]  # (B, K, S, hd)
            q = layer.query(x, positions, cos, sin, keys, values)  # (N, H, hd)
            x = layer.rest(x, attention(i, q.view(B, T, *q.shape[1:])).flatten(0, 1).flatten(1))
        return x

    def _looks_at(self, images: ImageKeys | None, positions: Tensor) -> Callable[[int, Tensor], Tensor]:
        """A function of x (B · T, D) to call before every layer: cross-attention before some."""
        if images is None:
            return lambda layer, x: x
        visible = images.visible(positions)

        def look(layer: int, x: Tensor) -> Tensor:
            if layer not in self.cross_layers:
                return x
            i, block = self.cross_layers[layer]
            return block(x.view(*positions.shape, -1), images.keys[i], images.values[i], visible).flatten(0, 1)

        return look

    # ---- captured

    @torch.inference_mode()
    def logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """float32 logits (B, T, V) for new ids (B, T); the cache grows by T tokens."""
        T = tokens.shape[1]
        padded = next((n for n in PASS_LENGTHS if n >= T), None)
        if self.capture is None or padded is None or cache.longest + padded > cache.max_seq_len:
            return self.model.logits(self.hidden(tokens, cache))
        self._clear(cache)
        try:
            run = self._captured(self.capture, tokens, padded, cache)
        except RuntimeError as error:  # nothing is lost: the plain pass writes the same keys and values
            self._captures_failed(error)
            return self.model.logits(self.hidden(tokens, cache))
        logits = run(tokens, cache.lengths)
        cache.advance(T)
        return logits

    def _captured(self, capture: Capture, tokens: Tensor, T: int, cache: KVCache) -> "CapturedPass":
        with self.lock:
            width = cache.max_seq_len if self._reads_lengths(cache, T) else next_width(cache, T)
            key = (*_addresses(cache), cache.keys.shape, T, width)
            if key not in self.graphs:
                try:
                    self.graphs[key] = self._new(capture, tokens, T, cache, width)
                except RuntimeError as error:
                    if not is_out_of_memory(error) or not self.graphs:
                        raise
                    self.graphs.clear()  # older graphs may hold the missing memory
                    self.graphs[key] = self._new(capture, tokens, T, cache, width)
                if len(self.graphs) > MOST_GRAPHS:
                    self.graphs.popitem(last=False)
            self.graphs.move_to_end(key)
            return self.graphs[key]

    def _reads_lengths(self, cache: KVCache, T: int) -> bool:
        """Whether attention reads the rows' lengths on the device, so that one graph serves all lengths."""
        return not cache.needs_mask if T > 1 else _has_kernel(cache)

    def _new(self, capture: Capture, tokens: Tensor, T: int, cache: KVCache, width: int) -> "CapturedPass":
        start, B = time.perf_counter(), len(tokens)

        def run(tokens: Tensor, lengths: Tensor) -> Tensor:
            x = self._layers(tokens, lengths, cache, width)
            return norm_linear(x, self.model.norm, self.model.output).float().view(B, T, -1)

        ids = torch.nn.functional.pad(tokens, (0, T - tokens.shape[1]))  # real ids: capturing runs the pass once
        captured = CapturedPass(capture, run, ids, cache.lengths.clone(), self.angles.up_to(cache.max_seq_len))
        self.capture_seconds += time.perf_counter() - start
        return captured

    def _captures_failed(self, error: RuntimeError) -> None:
        if is_out_of_memory(error):
            return  # this pass is launched kernel by kernel; the next may find the memory
        logger.warning("cannot capture a decode step here (%s): launching its kernels one by one", _first_line(error))
        self.capture = None

    def _clear(self, cache: KVCache) -> None:
        """Zero a new cache if attention is masked: a NaN in uninitialised memory spreads through a mask."""
        if cache.needs_mask and cache not in self.cleared:
            cache.keys[:, :, :, cache.longest :] = cache.values[:, :, :, cache.longest :] = 0
            self.cleared.add(cache)

    def warm_up(self) -> None:
        """Compile all kernels now, for prompts, tokens, drafts and batches, before any text."""
        for B, prompts, passes in ((1, (17, 33, 65), PASS_LENGTHS), (2, (), (1,))):
            cache = new_cache(self.model, B, WARM_UP_TOKENS)
            for T in prompts + passes:
                tokens = torch.zeros(B, T, dtype=torch.long, device=self.model.device)
                log_normalizer(self.logits(tokens, cache)[:, -1])
                cache.truncate([1] * B)
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
        """Rotated queries (N, H, hd) of x (N, D); writes its keys and values to the layer's cache."""
        return norm_query(x, self.attention_norm, self.wqkv, positions, cos, sin, keys, values)

    def rest(self, x: Tensor, heads: Tensor) -> Tensor:
        """The block's output (N, D) from its input x and its attention output `heads` (N, H · hd)."""
        x = linear(heads, self.wo, add=x)
        hidden = norm_swiglu(x, self.ffn_norm, self.w13)  # (N, F)
        return linear(hidden, self.w2, add=x)


class Angles:
    """RoPE cosines and sines of every position, computed once per cache size."""

    def __init__(self, model: Transformer):
        self.args, self.device = model.args, model.device
        self.tables: tuple[Tensor, Tensor] = (torch.empty(0, device="cpu"), torch.empty(0, device="cpu"))

    def up_to(self, n_positions: int) -> tuple[Tensor, Tensor]:
        """Two float32 tables (n_positions or more, hd/2). Graphs keep the older tables that they read."""
        if len(self.tables[0]) < n_positions:
            positions = torch.arange(n_positions, device=self.device)[None]
            cos, sin = rope_rotations(positions, rope_frequencies(self.args, self.device))  # (1, S, 1, hd/2)
            self.tables = cos[0, :, 0].contiguous(), sin[0, :, 0].contiguous()
        return self.tables


class LayerAttention(Protocol):
    def __call__(self, layer: int, q: Tensor) -> Tensor:
        """Attention of a layer's queries (B, T, H, hd) to the cache: the same shape."""
        ...


def attention_to(cache: KVCache, lengths: Tensor, positions: Tensor, T: int, width: int, longest: int) -> LayerAttention:
    """Attention of T new tokens per row, at `positions` (N,) after `lengths` (B,), to the first `width` tokens."""
    if T == 1 and _has_kernel(cache):
        from llama_ref.compiled.triton.attention import attend_one  # lazily: imports Triton

        return lambda layer, q: attend_one(q[:, 0], cache.keys[layer], cache.values[layer], lengths)[:, None]
    if isinstance(cache, FlashKVCache):
        at = FlashLengths.from_lengths(lengths, T, cache.max_seq_len, width)
        return lambda layer, q: cache.attend_piece(layer, q, at, longest)
    visible = torch.arange(width, device=positions.device) <= positions.view(-1, T)[:, :, None]  # (B, T, S)

    def masked(layer: int, q: Tensor) -> Tensor:
        keys, values = cache.read(layer, width)  # (B, S, K, hd)
        return grouped_attention(q, keys, values, group_mask(visible, q.shape[2] // keys.shape[2]))

    return masked


def _addresses(cache: KVCache) -> list[int]:
    """Addresses of the tensors that a captured pass uses, and its number of image tokens."""
    own, images = [cache.keys.data_ptr(), cache.values.data_ptr()], cache.images
    if images is None:
        return own
    of_images = images.keys, images.values, images.begins, images.ends
    return [*own, *(tensor.data_ptr() for tensor in of_images), images.begins.shape[1]]


def _has_kernel(cache: KVCache) -> bool:
    """Whether `attend_one` supports the cache."""
    return cache.keys.shape[-1] in KERNEL_HEAD_DIMS and uses_triton(cache.keys)


class CapturedPass:
    """A captured pass with its input tensors. `kept`: other tensors that it reads, kept alive."""

    def __init__(self, capture: Capture, run: Pass, tokens: Tensor, lengths: Tensor, kept: tuple[Tensor, ...]):
        self.tokens, self.lengths, self.kept = tokens, lengths, kept
        self.run = capture(run, self.tokens, self.lengths)

    def __call__(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, T, V) of ids (B, T), at most as many per row as were captured."""
        T = tokens.shape[1]
        self.tokens[:, :T].copy_(tokens)
        self.lengths.copy_(lengths)
        return self.run()[:, :T].clone()  # the next replay overwrites it


class CudaGraphs:
    """Captures passes as CUDA graphs, which share the memory of their intermediate results."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Pass, tokens: Tensor, lengths: Tensor) -> Callable[[], Tensor]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        with torch.cuda.device(self.device):
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                out = run(tokens, lengths)  # once uncaptured, for lazy compilation and loading
            current.wait_stream(self.stream)
            # Other threads may use the device. `out` is outside the shared memory: no graph overwrites it.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                out.copy_(run(tokens, lengths))

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def next_width(cache: KVCache, n_tokens: int) -> int:
    """Tokens of a cache that the next pass attends to: a power of two with room for `n_tokens` more, or all."""
    return min(max(SMALLEST_WIDTH, 1 << (cache.longest + n_tokens - 1).bit_length()), cache.max_seq_len)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
