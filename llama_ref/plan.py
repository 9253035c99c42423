"""Compute the memory per process, and the fewest cards that hold a model, from shapes alone.

Weights and KV cache are exact. Activations are an upper estimate, summed from the tensors alive at the
peaks of model.py, decoding/ and sampling.py; tests compare it with what generation takes on a CPU.
"""

import bisect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from llama_ref.args import N_LEARNABLE, TOKENS_MULTIPLE, ModelArgs
from llama_ref.checkpoint.folder import CheckpointFolder, open_folder
from llama_ref.checkpoint.meta_quantized.kinds import KIND_OF_WEIGHTS, ROUNDED, Int4Params, Kind
from llama_ref.checkpoint.releases import RELEASES, Release, find_release
from llama_ref.checkpoint.shapes import VISION, expected_shapes
from llama_ref.checkpoint.spelling import META, name_key
from llama_ref.errors import CheckpointError, FolderNotFound, RequestError
from llama_ref.parallel.sharding import WHOLE, Share
from llama_ref.quantization.scheme import SCALE_BITS, Scheme

# Copied from decoding/loop.py, decoding/reading.py and compiled/*_cache.py: importing these would import torch.
PREFILL_TOKENS, MASKLESS_PREFILL_TOKENS, LOGPROB_POSITIONS, CACHE_BLOCK, CUDA_CACHE_BLOCK = 1024, 8192, 128, 64, 1024
BLOCK_WEIGHTS = 1 << 22  # as in quantization/linear.py

# A card sold as 80 GB has 80 GiB. Programs get at least this fraction: 79.1 of 80, 23.5 of 24 on
# an A30, 23.6 of 24 on an RTX 4090. GDDR cards with ECC have less: 14.7 of 16 on a T4, 22.0 of 24
# on an A10 or L4.
GIB, USABLE = 1 << 30, 0.98
# For the CUDA context, cuBLAS workspace, NCCL buffers, allocator fragmentation: an allowance, not measured.
SET_ASIDE = 10**9

FEED_FORWARD, TABLES = ("w1 and w3", "w2"), ("tok_embeddings", "output")
SCALE_BYTES = 4  # in Meta's releases
ROUNDING_BYTES = 16  # per input of a matrix: float32 copies made while it is rotated and rounded

IN_SUMS = 6  # states (B, T, D) that Gloo's threads keep after an all-reduce (measured); NCCL: none

MOST_TENSOR_PARALLEL = 16
STAGES = (1, 2, 4, 8)
CARDS_PER_NODE = 8
LARGEST = 10**9  # largest accepted number, beyond any machine


# Bytes per number of unquantized weights and of activations.
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
SHOWN_DTYPES = ("bfloat16", "float32")  # float16 needs what bfloat16 does


@dataclass(frozen=True)
class Workload:
    """The largest workload to plan for. Raises RequestError on construction for an invalid number.

    `max_seq_len`: prompt and answer, in tokens. `max_batch_size`: sequences. `gpu_memory`: of one
    card, in GB as advertised.
    """

    gpu_memory: float
    max_seq_len: int
    max_batch_size: int

    def __post_init__(self) -> None:
        memory = self.gpu_memory
        if isinstance(memory, bool) or not isinstance(memory, int | float) or not 0 < memory <= LARGEST:
            raise RequestError(f"gpu_memory is {memory!r:.60}, expected the GB of one card: a positive number such as 24 or 80")
        for name in ("max_seq_len", "max_batch_size"):
            number = getattr(self, name)
            if type(number) is not int or not 0 < number <= LARGEST:
                raise RequestError(f"{name} is {number!r:.60}, expected a whole number from 1 to {LARGEST:,}")

    @property
    def card_bytes(self) -> int:
        """Memory of one card that programs can use."""
        return int(self.gpu_memory * GIB * USABLE)


@dataclass(frozen=True)
class Layout:
    """Tensor-parallel processes per stage × pipeline stages."""

    tensor: int
    stages: int = 1

    @property
    def processes(self) -> int:
        return self.tensor * self.stages

    @property
    def nodes(self) -> tuple[int, int]:
        """(machines, processes on each): fewest machines of 8 cards, stages whole if they fit."""
        block = 1 if self.spans_nodes else self.tensor  # stays on one machine
        n_blocks = self.processes // block
        most = CARDS_PER_NODE // block
        per_node = next(n for n in range(min(most, n_blocks), 0, -1) if n_blocks % n == 0)
        return n_blocks // per_node, per_node * block

    @property
    def spans_nodes(self) -> bool:
        """Whether matrices are split across machines, so that every layer waits for the network."""
        return self.tensor > CARDS_PER_NODE

    def shares(self) -> Iterator[Share]:
        """The share of every process."""
        return (Share(rank, self.tensor, stage, self.stages) for stage in range(self.stages) for rank in range(self.tensor))


@dataclass(frozen=True)
class Need:
    """Bytes in one process."""

    weights: int
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        """Including the allowance for CUDA."""
        return self.weights + self.kv_cache + self.activations + SET_ASIDE


@dataclass(frozen=True)
class Placement:
    """A layout in one dtype: the need of its largest process, and whether it fits a card."""

    dtype: str
    layout: Layout
    need: Need
    fits: bool


@dataclass(frozen=True)
class Model:
    """A model to plan for.

    `ckpt_dir`: the name or path to load it by. `context`: its context length, in tokens. `scheme`:
    its quantization, while loading or already in the folder (`is_quantized`). `kind`: how Meta's
    release is stored; `shards`: in how many shards.
    """

    name: str
    ckpt_dir: str
    args: ModelArgs
    tied: bool
    context: int
    scheme: Scheme | None = None
    is_quantized: bool = False
    kind: Kind = Kind.PLAIN
    shards: int = 1

    @property
    def quantization(self) -> str | None:
        """The quantization in words; None for unquantized weights."""
        if self.kind is Kind.PLAIN:
            return None if self.scheme is None else str(self.scheme)
        return str(Int4Params.from_args(self.args)) if self.kind is Kind.INT4 else self.kind.value


@dataclass(frozen=True)
class Matrix:
    """`count` matrices of one shape in a share: their rows, and columns out of `all_columns`."""

    name: str
    count: int
    rows: int
    columns: range
    all_columns: int

    @property
    def numbers(self) -> int:
        return self.count * self.rows * len(self.columns)


# ---- one process


def matrices(args: ModelArgs, tied: bool, share: Share = WHOLE) -> Iterator[Matrix]:
    """A share's part of every matrix; a tied output counts if the embedding is in another stage."""
    heads, ffn, vocabulary = share.slice_of(args.n_heads), share.slice_of(args.ffn_dim), len(share.slice_of(args.vocab_size))
    q_columns = range(heads.start * args.head_dim, heads.stop * args.head_dim)
    kv, dim = local_kv_heads(args, share) * args.head_dim, range(args.dim)
    n = len(share.layers(args.n_layers)) + count_cross_layers(args, share)  # of the same shapes
    yield Matrix("wq", n, len(q_columns), dim, args.dim)
    yield Matrix("wk and wv", 2 * n, kv, dim, args.dim)
    yield Matrix("wo", n, args.dim, q_columns, args.n_heads * args.head_dim)
    yield Matrix("w1 and w3", 2 * n, len(ffn), dim, args.dim)
    yield Matrix("w2", n, args.dim, ffn, args.ffn_dim)
    if share.is_first_stage:
        yield Matrix("tok_embeddings", 1, vocabulary, dim, args.dim)
    if share.is_last_stage and not (tied and share.is_first_stage):
        yield Matrix("output", 1, vocabulary, dim, args.dim)


def count_cross_layers(args: ModelArgs, share: Share = WHOLE) -> int:
    """Number of a share's cross-attention layers."""
    layers = share.layers(args.n_layers)
    return sum(layer in layers for layer in args.cross_layers)


def count_others(args: ModelArgs, share: Share = WHOLE) -> int:
    """Weights that are never quantized: norms, gates, and the vision encoder, which every process has."""
    n_cross = count_cross_layers(args, share)
    norms = (2 * (len(share.layers(args.n_layers)) + n_cross) + share.is_last_stage) * args.dim
    if not args.has_vision:
        return norms
    norms_and_gates = n_cross * (2 * args.head_dim + 2)
    return norms + norms_and_gates + count_encoder(args) + share.is_first_stage * N_LEARNABLE * args.dim


@lru_cache(maxsize=16)  # called for every process of every layout
def count_encoder(args: ModelArgs) -> int:
    """Weights of the vision encoder and its projection."""
    return sum(math.prod(shape) for name, shape in expected_shapes(args).items() if name.startswith(VISION))


def count_parameters(args: ModelArgs, tied: bool, share: Share = WHOLE) -> int:
    """Exact number of a share's weights."""
    return sum(matrix.numbers for matrix in matrices(args, tied, share)) + count_others(args, share)


def weight_bytes(model: Model, share: Share, size: int) -> int:
    """Exact bytes of a share's weights; `size` bytes per unquantized number.

    Raises RequestError as `_bytes` does.
    """
    held = sum(_bytes(model, matrix, size, share) for matrix in matrices(model.args, model.tied, share))
    return held + count_others(model.args, share) * size


def _bytes(model: Model, matrix: Matrix, size: int, share: Share) -> int:
    """Bytes of a matrix.

    Raises RequestError if groups do not divide its rows, or would be split among processes.
    """
    if model.kind is Kind.INT4:
        return _int4_bytes(matrix, Int4Params.from_args(model.args), size)
    if model.kind is Kind.FP8 and matrix.name in FEED_FORWARD:
        return _fp8_bytes(model, matrix, size, share)
    if model.kind is Kind.INT8 and matrix.name not in TABLES:
        return matrix.numbers + matrix.count * matrix.rows * SCALE_BYTES
    if model.scheme is None:
        return matrix.numbers * size
    bits = model.scheme.bits_of(matrix.name)
    if bits is None:
        return matrix.numbers * size
    per_row = 1 if bits == 8 else 2 * len(matrix.columns) // _group(model, model.scheme, matrix)  # scales, zero points
    return (matrix.numbers * bits + matrix.count * matrix.rows * per_row * SCALE_BITS[bits]) // 8


def _int4_bytes(matrix: Matrix, params: Int4Params, size: int) -> int:
    """Bytes of a matrix in an int4 release; embedding and output have eight bits."""
    rows = matrix.count * matrix.rows
    if matrix.name in TABLES:
        return matrix.numbers + rows * SCALE_BYTES
    _check_groups(matrix, params.group)
    low_rank = params.rank * (rows + matrix.count * len(matrix.columns)) * size
    return matrix.numbers // 2 + rows * (len(matrix.columns) // params.group) * SCALE_BYTES + low_rank


def _fp8_bytes(model: Model, matrix: Matrix, size: int, share: Share) -> int:
    """Bytes of feed-forward matrices in an fp8 release; its first and last layer are not in fp8."""
    layers = share.layers(model.args.n_layers)
    n_fp8 = len([layer for layer in layers if 0 < layer < model.args.n_layers - 1])
    per_layer = matrix.numbers // len(layers)
    of_shard = matrix.all_columns // model.shards  # every shard has separate scales for w2
    n_scales = (matrix.columns.stop - 1) // of_shard - matrix.columns.start // of_shard + 1 if matrix.name == "w2" else 1
    scales = matrix.rows * (matrix.count // len(layers)) * n_scales * SCALE_BYTES
    return n_fp8 * (per_layer + scales) + (len(layers) - n_fp8) * per_layer * size


def _group(model: Model, scheme: Scheme, matrix: Matrix) -> int:
    if not model.is_quantized:  # each process quantizes its part
        return scheme.group_for(matrix.name, len(matrix.columns))
    group = scheme.group_for(matrix.name, matrix.all_columns)
    _check_groups(matrix, group)
    return group


def _check_groups(matrix: Matrix, group: int) -> None:
    if matrix.columns.start % group or matrix.columns.stop % group:
        raise RequestError(f"so many processes would split groups of {group} weights in {matrix.name}")


def local_kv_heads(args: ModelArgs, share: Share) -> int:
    """Number of key/value heads of a share: the length of sharding.kv_heads' list."""
    heads = len(share.slice_of(args.n_heads))
    return heads // math.gcd(args.n_heads // args.n_kv_heads, heads)


def kv_cache_bytes(args: ModelArgs, share: Share, workload: Workload, size: int) -> int:
    """Bytes of the share's keys and values, all sequences at full length; `size` bytes per number.

    For a vision release, each sequence has one image with the most tiles.
    """
    per_token = 2 * len(share.layers(args.n_layers)) * local_kv_heads(args, share) * args.head_dim * size
    block = CUDA_CACHE_BLOCK if workload.max_batch_size == 1 else CACHE_BLOCK
    tokens = per_token * -(-workload.max_seq_len // block) * block
    return (tokens + image_bytes(args, share, size)) * workload.max_batch_size


def image_bytes(args: ModelArgs, share: Share, size: int) -> int:
    """Bytes of a share's keys and values of an image with the most tiles; 0 for a text model."""
    if not args.has_vision:
        return 0
    n_tokens = args.vision_max_num_chunks * args.patches_per_tile
    return 2 * count_cross_layers(args, share) * n_tokens * local_kv_heads(args, share) * args.head_dim * size


def activation_bytes(
    args: ModelArgs, share: Share, workload: Workload, size: int, *, is_quantized: bool = False, rounded_width: int = 0
) -> int:
    """Upper estimate of the peak memory of any call besides weights and cache; `size` bytes per number.

    Covers prompts of any length up to max_seq_len, every sampling option, and log-probabilities of
    the prompt; with and without masks (without them, a prompt runs in longer pieces).
    `rounded_width`: width of the widest inputs that are rounded while the model runs.
    """
    B, S, V = workload.max_batch_size, workload.max_seq_len, args.vocab_size
    T = min(max(1, PREFILL_TOKENS // B), S)  # tokens of each row in one piece of the prefill
    state = size * B * T * args.dim  # x: (B, T, D)
    ended = size * B * args.dim  # each row's last state
    layers = max(_layer_bytes(args, share, B, T, S, size), _maskless_layer_bytes(args, share, B, S, size))
    layers += state * (IN_SUMS * (share.world_size > 1) + (share.n_stages > 1))  # and one on its way to the next stage
    gathered = 1 if share.world_size == 1 else 3  # logits: this process's part, all parts, joined
    float32 = 4 + 4 * (size < 4)  # log-probabilities, and logits where they are not float32 already
    scores = 2 * state + (gathered * size + float32) * min(LOGPROB_POSITIONS, T) * V
    in_piece = B * max(T, min(max(1, MASKLESS_PREFILL_TOKENS // B), S))  # tokens of all rows
    layers += ROUNDING_BYTES * in_piece * rounded_width
    if is_quantized:
        layers += _block_bytes(args, share, B * T, size)
        scores += _block_bytes(args, share, min(LOGPROB_POSITIONS, T), size)
    layers = max(layers + _cross_bytes(args, share, in_piece, size), _encoder_bytes(args, share, size))
    sampling = 48 * B * V  # logits, probabilities, their sort with its int64 indices, float64 sums
    token_ids = 8 * (B + 2) * S
    return token_ids + 4 * B * V + max(ended + max(layers, scores), sampling)


def _cross_bytes(args: ModelArgs, share: Share, n: int, size: int) -> int:
    """Bytes of cross-attention's masks, besides those of a layer: n tokens see an image each."""
    if not args.has_vision:
        return 0
    group = len(share.slice_of(args.n_heads)) // local_kv_heads(args, share)
    pairs = n * args.vision_max_num_chunks * args.patches_per_tile
    return (3 + group + group * size) * pairs  # begins, ends and both as bool; for a group's heads; in the model's dtype


def _encoder_bytes(args: ModelArgs, share: Share, size: int) -> int:
    """Peak bytes of encoding one image with the most tiles, and computing its keys and values."""
    if args.vision_chunk_size is None:
        return 0
    n = args.vision_max_num_chunks * (args.patches_per_tile + TOKENS_MULTIPLE)
    pixels = args.vision_max_num_chunks * 3 * args.vision_chunk_size**2
    kept = 2 * (1 + len(args.vision_kept_layers))  # states, and their concatenation
    block = 2 * 4 + 6  # the hidden features before and after GELU, and x, its norm, q, k, v and their attention
    encoder = size * n * args.vision_dim * (kept + block)
    kv = local_kv_heads(args, share) * args.head_dim
    projected = n * (size * args.dim + kv * (3 * 4 + 4 * size))  # and a layer's keys, in float32 while they are normed
    return 2 * size * pixels + max(encoder, size * n * args.dim + projected)


def _block_bytes(args: ModelArgs, share: Share, rows: int, size: int) -> int:
    """Bytes of a quantized matrix's product: a dequantized block, outputs, separate and joined."""
    outputs = len(share.slice_of(args.vocab_size)) if rows <= LOGPROB_POSITIONS else args.dim
    widest = max(len(share.slice_of(args.ffn_dim)), outputs)
    largest = max(matrix.rows * len(matrix.columns) for matrix in matrices(args, False, share))
    return (2 + 2 * size) * min(BLOCK_WEIGHTS, largest) + 2 * size * rows * widest


def _layer_bytes(args: ModelArgs, share: Share, B: int, T: int, S: int, size: int) -> int:
    """Peak bytes of one layer: T new tokens in each of B rows, S tokens with the earlier ones."""
    n = B * T
    q, kv = len(share.slice_of(args.n_heads)) * args.head_dim, local_kv_heads(args, share) * args.head_dim
    group = q // kv
    x = size * n * args.dim  # two are always there: the residual before, and its normed copy or the residual after attention
    wide = 4 if size < 4 else 0  # a float32 copy, where that is another dtype
    # Pairs of masked queries and keys; a prompt in one piece has a mask only in decode.
    pairs = n * S if T < S else B * S

    positions = n * (8 + 4 * args.head_dim)  # (B, T) int64; cosines and sines (B, T, 1, hd/2) float32
    mask = (1 + group) * pairs  # bool (B, T, S), and (B, 1, G·T, S) for a group's heads
    norm = n * args.dim * (wide + 4 + (size if wide else 0) + size)  # float32 copy, quotient, that cast, times the weight
    rotate = size * n * (2 * q + 2 * kv) + n * q * (wide + 8)  # q, k, v; products of pairs in float32
    # q, q regrouped, out; K and V where a kernel packs them; the mask in the model's dtype, once more where its rows are padded
    attend = x + 3 * size * n * q + 2 * size * B * S * kv + 2 * size * group * pairs
    feed_forward = x + 3 * size * n * len(share.slice_of(args.ffn_dim))  # silu(w1 x), w3 x and their product
    return 2 * x + positions + mask + max(norm, rotate, attend, feed_forward)


def _maskless_layer_bytes(args: ModelArgs, share: Share, B: int, S: int, size: int) -> int:
    """Peak bytes of a layer without masks (NVIDIA cards since Ampere), for a full-length piece."""
    n = B * min(max(1, MASKLESS_PREFILL_TOKENS // B), S)
    heads = (len(share.slice_of(args.n_heads)) + 2 * local_kv_heads(args, share)) * args.head_dim
    x, qkv = size * n * args.dim, size * n * heads
    wide = 4 + 4 * (size < 4)  # temporary float32 copies
    norm, rotate = n * args.dim * (wide + 2 * size), qkv + n * heads * wide
    feed_forward = 3 * size * n * len(share.slice_of(args.ffn_dim))  # w1 x and w3 x, and their gated product
    return 3 * x + 2 * qkv + max(norm, rotate, feed_forward)


# ---- a whole job


def plan(model: Model, workload: Workload, dtypes: Iterable[str] = SHOWN_DTYPES) -> list[Placement]:
    """Every layout in every dtype, fewest processes first. Raises RequestError if the scheme allows none."""
    possible = possible_layouts(model)
    return [_place(model, workload, dtype, layout) for dtype in dtypes for layout in possible]


def possible_layouts(model: Model) -> list[Layout]:
    """The layouts in which quantization groups stay whole.

    Raises RequestError if there are none.
    """
    weight_bytes(model, WHOLE, 2)
    has_groups = model.scheme is not None or model.kind is Kind.INT4
    return [layout for layout in layouts(model.args) if not has_groups or _has_groups(model, layout)]


def _has_groups(model: Model, layout: Layout) -> bool:
    try:
        return all(weight_bytes(model, share, 2) for share in layout.shares())
    except RequestError:
        return False


def layouts(args: ModelArgs) -> list[Layout]:
    """All layouts, best first: fewest processes, no matrix across machines, fewest stages."""
    tensor = [n for n in range(1, MOST_TENSOR_PARALLEL + 1) if args.n_heads % n == 0]
    possible = [Layout(n, stages) for n in tensor for stages in STAGES if stages <= args.n_layers]
    return sorted(possible, key=lambda layout: (layout.processes, layout.spans_nodes, layout.stages))


def smallest(placements: Iterable[Placement]) -> Placement | None:
    """The first fitting placement with the fewest processes; None if none fits."""
    fitting = (placement for placement in placements if placement.fits)
    return min(fitting, key=lambda placement: placement.layout.processes, default=None)


def longest(model: Model, workload: Workload, placement: Placement) -> int:
    """The largest max_seq_len that fits a placement at the workload's batch size, up to the model's context; 0 if none does."""

    def is_too_long(length: int) -> bool:
        return not _place(model, replace(workload, max_seq_len=length), placement.dtype, placement.layout).fits

    return bisect.bisect_left(range(1, model.context + 1), True, key=is_too_long)


def _place(model: Model, workload: Workload, dtype: str, layout: Layout) -> Placement:
    needs = (_need(model, workload, SIZES[dtype], share) for share in layout.shares())
    most = max(needs, key=lambda need: need.total)
    return Placement(dtype, layout, most, most.total <= workload.card_bytes)


def _need(model: Model, workload: Workload, size: int, share: Share) -> Need:
    return Need(
        weights=weight_bytes(model, share, size),
        kv_cache=kv_cache_bytes(model.args, share, workload, size),
        activations=activation_bytes(
            model.args,
            share,
            workload,
            size,
            is_quantized=model.quantization is not None,
            rounded_width=_rounded_width(model, share),
        ),
    )


def _rounded_width(model: Model, share: Share) -> int:
    """The most inputs that a process rounds together: int4 releases gather those of all processes."""
    if model.kind not in ROUNDED:
        return 0
    return model.args.ffn_dim if model.kind is Kind.INT4 else len(share.slice_of(model.args.ffn_dim))


def smaller_workload(model: Model, workload: Workload, dtypes: Iterable[str]) -> Workload | None:
    """The first of halved batches, then halved lengths at batch 1, that fits; None if the weights do not fit."""
    dtypes = list(dtypes)
    batches = [replace(workload, max_batch_size=size) for size in _halves(workload.max_batch_size)]
    lengths = [replace(workload, max_batch_size=1, max_seq_len=length) for length in _halves(workload.max_seq_len)]
    return next((smaller for smaller in [*batches, *lengths] if smallest(plan(model, smaller, dtypes))), None)


def _halves(number: int) -> Iterator[int]:
    while number := number // 2:
        yield number


# ---- find the model


def find_model(name: str, quantize: str | None = None) -> Model:
    """The model in a folder (a path or downloaded release) or, without files, a release by name.

    `quantize`: "int8", "int4" or "int4:group=32", as when loading it. Raises RequestError with the reason
    for a release that cannot be loaded (the pruned int4 guard) and for a folder that is quantized
    already, CheckpointError for a folder that cannot be read.
    """
    scheme = None if quantize is None else Scheme.parse(quantize)
    model = _find_model(name)
    if model.kind is not Kind.PLAIN and scheme:
        raise RequestError(f"{name} is quantized already ({model.quantization}): leave --quantize out, or name a bf16 release")
    if model.is_quantized and scheme not in (None, model.scheme):
        raise RequestError(
            f"{name} is already quantized to {model.scheme}; only the original can be quantized to {scheme}: leave "
            "--quantize out, or name the original"
        )
    return replace(model, scheme=scheme or model.scheme)


def _find_model(name: str) -> Model:
    try:
        return _of_folder(name, open_folder(name))
    except FolderNotFound:
        is_path = any(sign in name.removeprefix(META) for sign in ("/", "\\", "~")) or name in ("", ".", "..")
        if is_path:
            raise
        return model_of_release(_find_release(name))
    except CheckpointError:
        release = _release_named(name)  # an incomplete download: its name gives the shape
        if release is None:
            raise
        return model_of_release(release)


def _of_folder(name: str, folder: CheckpointFolder) -> Model:
    from llama_ref.checkpoint.hf.config import LONG_CONTEXT, SHORT_CONTEXT
    from llama_ref.checkpoint.reader import is_tied, stored_kind

    args = folder.read_args()
    release = _release_named(folder.name)
    kind = stored_kind(folder, args)
    context = release.max_seq_len if release else LONG_CONTEXT if args.use_scaled_rope else SHORT_CONTEXT
    tied = is_tied(folder)
    shown = release.name if release else folder.name
    model = Model(shown, name, args, tied, context, kind=kind, shards=len(folder.shards))
    if not folder.is_quantized:
        return model
    from llama_ref.checkpoint.quantized_reader import scheme_of

    return replace(model, scheme=scheme_of(folder, args), is_quantized=True)


def _find_release(name: str) -> Release:
    try:
        return find_release(name)
    except RequestError as error:
        raise RequestError(f"no checkpoint at {name}, and {error}") from None


def _release_named(name: str) -> Release | None:
    key = name_key(name)
    return next((each for each in RELEASES.values() if key in (name_key(each.name), name_key(each.folder))), None)


def model_of_release(release: Release) -> Model:
    """The model of a release, from its shape. Raises RequestError for the pruned int4 guard."""
    if "hidden_dim" in release.params:
        raise RequestError(
            f"{release.name} is an ExecuTorch program, which PyTorch cannot read; Llama-Guard-3-1B is the guard in bf16"
        )
    kind, args = KIND_OF_WEIGHTS[release.weights], ModelArgs.from_dict(release.params)
    tied = release.tied and kind is Kind.PLAIN
    return Model(release.name, release.name, args, tied, release.max_seq_len, kind=kind, shards=release.shards)
