"""Decode steps on CUDA, put onto a model from outside: recorded once, then replayed by a single call.

For one token a GPU needs less time than Python takes to ask for a thousand kernels. A CUDA graph has them recorded, and runs
them again as they were: the same kernels, in the same shapes, at the same addresses. So nothing may be in the recording that
changes from token to token. Ids and lengths stand in tensors that are filled before each replay; positions and mask are made
from the lengths, on the device; and attention looks, masked, at a window of the cache that stays as wide as it is for many
tokens: widths are powers of two, so that a text that grows needs few recordings.

The cache's addresses are in the recording too, and every call of the generation loop brings a cache of its own. A recording is
kept under those addresses, not under the cache: PyTorch's allocator likes to give a new cache the memory that the last one of
its size had, and the next call then finds its recordings made. Nothing is copied for that, no cache is kept alive, and those
that are held for long, by conversations or a draft model, stand side by side.

Before that a layer is compiled (torch.compile, where Triton is there for it), which fuses what small kernels there are between
the products: one function for all layers and widths, in seconds. `torch.compile(mode="reduce-overhead")` would record as well,
but never forgets a recording whose cache is gone, and checks every weight's address before each replay.

None of this has been timed: it was tested on a CPU and on a pretended GPU.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ref.model import KVCache, Transformer, TransformerBlock, rope_frequencies, rope_rotations

SMALLEST_WINDOW = 256  # tokens
MOST_RECORDINGS = 16  # the least recently used goes first; a text of 128k tokens comes to 10

Step = Callable[[Tensor, Tensor], Tensor]  # ids (B, 1) and lengths (B,) -> the last layer's normed output (B, 1, D)
Recorder = Callable[[Step, Tensor, Tensor], Callable[[], Tensor]]  # a step and its inputs -> what does it again, on these


def compile_cuda_decode(model: Transformer) -> None:
    """Make a model on a CUDA device faster at steps of one token, for any number of rows; changed in place.

    Takes some seconds to compile, fewer where PyTorch's cache on disk has it from an earlier run. Where that does not work,
    without Triton or a C compiler above all, steps are recorded uncompiled, and one line on stderr says so. Quantized matrices
    must be in the layout that they are to have (`quantize.use_fast_kernels`) before.
    """
    model.hidden = StaticDecode(model, compiled_layer_step(model), CudaGraphs(model.norm.weight.device))


def compiled_layer_step(model: Transformer) -> Callable[..., Tensor]:
    """`layer_step` compiled for a model's layers, or as it is, with a note, where that cannot be done."""
    compiled = torch.compile(layer_step, dynamic=False)
    note("compiling the decode step: some seconds, fewer the next time")
    try:
        _warm_up(model, compiled)
    except Exception as error:  # of many kinds: no Triton, no C compiler, no Python headers, a card too old
        note(f"it cannot be compiled here ({_first_line(error)}): decode steps are recorded uncompiled")
        return layer_step
    return compiled


class StaticDecode:
    """In place of a model's `hidden`: recorded steps for one token of each row, the model's own way for all else."""

    def __init__(self, model: Transformer, layer_step: Callable[..., Tensor], record: Recorder):
        self.model = weakref.proxy(model)  # which holds this: memory of a GPU must not wait for Python to find the circle
        self.layer_step = layer_step
        self.record: Recorder | None = record  # None: it was tried in vain
        self.recordings: OrderedDict[tuple, Recording] = OrderedDict()
        self.cleaned: weakref.WeakSet[KVCache] = weakref.WeakSet()

    def __call__(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """As `Transformer.hidden`."""
        if self.record is None or cache is None or tokens.shape[1] != 1 or cache.longest == cache.max_seq_len:
            return Transformer.hidden(self.model, tokens, cache)
        try:
            recording = self._recording(tokens, cache)
        except RuntimeError as error:  # nothing is lost: what the step wrote, the plain one writes again
            note(f"the decode step cannot be recorded here ({_first_line(error)}): decoding stays uncompiled")
            self.record = None
            return self(tokens, cache)
        hidden = recording(tokens, cache.lengths)
        cache.advance(1)
        return hidden

    @torch.inference_mode()
    def _recording(self, tokens: Tensor, cache: KVCache) -> "Recording":
        if cache not in self.cleaned:  # a NaN that memory was left with would be one even where masked
            cache.keys[:, :, :, cache.longest :] = cache.values[:, :, :, cache.longest :] = 0
            self.cleaned.add(cache)
        width = window(cache)
        key = (cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.shape, width)
        if key not in self.recordings:
            keys, values = cache.keys, cache.values

            def step(tokens: Tensor, lengths: Tensor) -> Tensor:
                return decode_step(self.model, self.layer_step, tokens, lengths, keys, values, width)

            self.recordings[key] = Recording(self.record, step, tokens, cache.lengths)
            if len(self.recordings) > MOST_RECORDINGS:
                self.recordings.popitem(last=False)
        self.recordings.move_to_end(key)
        return self.recordings[key]


class Recording:
    """A step with tensors of its own for what goes in."""

    def __init__(self, record: Recorder, step: Step, tokens: Tensor, lengths: Tensor):
        self.tokens, self.lengths = tokens.clone(), lengths.clone()
        self.run = record(step, self.tokens, self.lengths)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self.lengths.copy_(lengths)
        return self.run().clone()  # the next replay writes to the same place


class CudaGraphs:
    """Records steps as CUDA graphs, which share the memory for what they compute on the way."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step, tokens: Tensor, lengths: Tensor) -> Callable[[], Tensor]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        with torch.cuda.device(self.device):
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                out = step(tokens, lengths)  # once unrecorded: what is compiled, chosen and loaded only once must be by now
            current.wait_stream(self.stream)
            # Other threads may use the device meanwhile. `out` is outside of the shared memory: no other graph overwrites it.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                out.copy_(step(tokens, lengths))

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def window(cache: KVCache) -> int:
    """How much of a cache the next token's attention looks at: the first power of two that has room for it, or all."""
    return min(max(SMALLEST_WINDOW, 1 << cache.longest.bit_length()), cache.max_seq_len)


def decode_step(
    model: Transformer,
    layer_step: Callable[..., Tensor],
    tokens: Tensor,
    lengths: Tensor,
    keys: Tensor,
    values: Tensor,
    width: int,
) -> Tensor:
    """`Transformer.hidden` for ids (B, 1) at places `lengths` (B,), with no shape and no number that hangs on the lengths.

    keys and values (n_layers, B, K, max_seq_len, hd) are a cache's; of these, attention reads the first `width` tokens.
    """
    positions = lengths[:, None]  # (B, 1)
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]  # (B, 1)
    rotations = rope_rotations(positions, rope_frequencies(model.args, tokens.device))
    visible = (torch.arange(width, device=tokens.device) <= positions)[:, None, None]  # (B, 1, 1, S)
    x = model.tok_embeddings(tokens)  # (B, 1, D)
    for block, *of_layer in zip(model.layers, keys, values, strict=True):
        shared = (x, rows, positions, *rotations)
        for tensor, dim in [*((tensor, 0) for tensor in (*shared, visible, *of_layer)), (visible, 3)]:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
        for tensor in of_layer:
            torch._dynamo.maybe_mark_dynamic(tensor, 2)
        x = layer_step(block, *shared, visible, *of_layer)
    return model.norm(x)


def layer_step(
    block: TransformerBlock,
    x: Tensor,
    rows: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    visible: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """One block on x (B, 1, D), keys and values (B, K, max_seq_len, hd); made of tensors alone, the same for all layers."""
    return block(x, LayerContext(rows, positions, (cos, sin), visible, keys, values), layer=0)


@dataclass
class LayerContext:
    """In place of a block's `Context`, and of the `KVCache` in it: what a single layer needs of them."""

    rows: Tensor
    positions: Tensor
    rotations: tuple[Tensor, Tensor]
    visible: Tensor
    keys: Tensor
    values: Tensor

    @property
    def cache(self) -> "LayerContext":
        return self

    def extend(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, 1, K, hd); return the window of all, (B, S, K, hd) each."""
        self.keys[self.rows, :, positions] = k
        self.values[self.rows, :, positions] = v
        width = self.visible.shape[-1]
        return self.keys[:, :, :width].transpose(1, 2), self.values[:, :, :width].transpose(1, 2)

    def mask(self, group: int) -> Tensor:
        """`visible` for the G heads of a group: (B, 1, G, S)."""
        return self.visible.expand(-1, -1, group, -1)


@torch.inference_mode()
def _warm_up(model: Transformer, layer_step: Callable[..., Tensor]) -> None:
    """Compile for one row; a batch's first step compiles for any number of rows."""
    norm = model.norm.weight
    shape = (model.args.n_layers, 1, model.args.n_kv_heads, SMALLEST_WINDOW + 1, model.args.head_dim)
    keys, values = torch.zeros(2, *shape, dtype=norm.dtype, device=norm.device)
    tokens = torch.zeros(1, 1, dtype=torch.long, device=norm.device)
    decode_step(model, layer_step, tokens, tokens[0], keys, values, SMALLEST_WINDOW)


def note(text: str) -> None:
    """A line on stderr."""
    from llama_ref.terminal import note  # only now: rich draws from Python's random numbers when it is imported

    note(text)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
