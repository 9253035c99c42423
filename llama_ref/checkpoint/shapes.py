"""The names, shapes and dtypes of a model's tensors, and how files are compared with them."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from llama_ref.args import N_LEARNABLE, PATCH_SIZE, ModelArgs
from llama_ref.formatting import dtype_name
from llama_ref.parallel.sharding import split_dim

if TYPE_CHECKING:
    from torch import Tensor  # for types only: `verify` must not wait for torch's import

T = TypeVar("T")
Shape = tuple[int, ...]
DtypeAndShape = tuple[str, Shape]

EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
LEARNABLE = "learnable_embedding.weight"  # of a vision release, for ids after the vocabulary
TEXT, VISION = "text_model.", "vision_model."  # prefixes in a vision release's shards

# Older files hold RoPE's frequencies, Meta's once and Hugging Face's in every layer. params.json
# implies them.
IGNORED = re.compile(r"(?:text_model\.)?rope\.freqs|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
MOST_SHARDS = 256  # Meta's largest release has 16; a damaged number must not imply millions
WEIGHT_DTYPES = ("bfloat16", "float16", "float32")
FP8 = "float8_e4m3fn"
WHY_MISSING = {"lm_head.weight": '; if the output is the embedding, set "tie_word_embeddings" to true in config.json'}


class Expected(NamedTuple):
    """A tensor that a model's files should hold: its unsharded shape and its possible dtypes.

    `may_be_tied`: files may leave it out, because it is the embedding. `is_column`: files may leave
    out its last dimension, which is 1.
    """

    shape: Shape
    dtypes: tuple[str, ...] = WEIGHT_DTYPES
    is_optional: bool = False
    may_be_tied: bool = False
    is_column: bool = False


def expected_tensors(args: ModelArgs) -> dict[str, Expected]:
    """The tensors of a release that is not quantized, in the model's order."""
    return {name: Expected(shape, may_be_tied=name == OUTPUT) for name, shape in expected_shapes(args).items()}


def expected_shapes(args: ModelArgs) -> dict[str, Shape]:
    """The shapes of a model's whole tensors by name, in the model's order.

    Written down instead of taken from the model, because torch takes a second to import.
    """
    dim, q_dim, kv_dim = args.dim, args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    attention = {
        "attention.wq.weight": (q_dim, dim),
        "attention.wk.weight": (kv_dim, dim),
        "attention.wv.weight": (kv_dim, dim),
        "attention.wo.weight": (dim, q_dim),
    }
    rest = {
        "feed_forward.w1.weight": (args.ffn_dim, dim),
        "feed_forward.w2.weight": (dim, args.ffn_dim),
        "feed_forward.w3.weight": (args.ffn_dim, dim),
        "attention_norm.weight": (dim,),
        "ffn_norm.weight": (dim,),
    }
    text = {
        EMBEDDING: (args.vocab_size, dim),
        **_numbered("layers", args.n_layers, attention | rest),
        "norm.weight": (dim,),
        OUTPUT: (args.vocab_size, dim),
    }
    if not args.has_vision:
        return text
    norms = {"attention.q_norm.weight": (args.head_dim,), "attention.k_norm.weight": (args.head_dim,)}
    cross = {"gate_attn": (1,), "gate_ffwd": (1,)} | attention | norms | rest
    return {
        **text,
        **_numbered("cross_attention_layers", len(args.cross_layers), cross),
        **_vision_shapes(args),
        LEARNABLE: (N_LEARNABLE, dim),
    }


def _vision_shapes(args: ModelArgs) -> dict[str, Shape]:
    """The shapes of the image encoder and its projection, in the model's order."""
    width, P, n = args.vision_dim, args.patches_per_tile, args.vision_max_num_chunks
    tile = {"embedding": (n, n, 1, width), "gate": (1,)}
    block = {f"attn.{w}.weight": (width, width) for w in ("wq", "wk", "wv", "wo")} | {
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
        **_norm("ln_1", width),
        **_norm("ln_2", width),
    }
    encoder = {
        "class_embedding": (width,),
        "positional_embedding": (P, width),
        "gated_positional_embedding": (n, n, P, width),
        "gated_positional_embedding_gate": (1,),
        "conv1._linear.weight": (width, 3 * PATCH_SIZE**2),
        **{f"pre_tile_pos_embed.{name}": shape for name, shape in tile.items()},
        **{f"post_tile_pos_embed.{name}": shape for name, shape in tile.items()},
        **_norm("ln_pre", width),
        **_norm("ln_post", width),
        **_numbered("transformer.resblocks", args.vision_n_layers, block),
        **_numbered("global_transformer.resblocks", args.vision_n_global_layers, {"gate_attn": (1,), "gate_ffn": (1,)} | block),
    }
    return {
        **{f"{VISION}vision_encoder.{name}": shape for name, shape in encoder.items()},
        f"{VISION}vision_projection.weight": (args.dim, (1 + len(args.vision_kept_layers)) * width),
        f"{VISION}vision_projection.bias": (args.dim,),
    }


def _numbered(prefix: str, n: int, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    return {f"{prefix}.{i}.{name}": shape for i in range(n) for name, shape in shapes.items()}


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def own_names(shard: Mapping[str, T], args: ModelArgs) -> dict[str, T]:
    """A shard's tensors by the model's names.

    In a vision release's shards, tensors of the text model have a prefix, which is removed. A name
    without a prefix there is marked as unexpected.
    """
    if not args.has_vision or EMBEDDING in shard:
        return dict(shard)
    return {
        name.removeprefix(TEXT) if name.startswith((TEXT, VISION)) else f"(without prefix) {name}": tensor
        for name, tensor in shard.items()
    }


def name_in_shards(name: str, args: ModelArgs) -> str:
    """A tensor's name in Meta's shards."""
    return TEXT + name if args.has_vision and not name.startswith(VISION) else name


def shard_shape(name: str, whole: Shape, n_shards: int) -> Shape:
    """The shape of one shard's part of a tensor."""
    dim = split_dim(name)
    return tuple(size // n_shards if axis == dim else size for axis, size in enumerate(whole))


def implied_shards(embedding: Shape, vocab_size: int) -> int | None:
    """The number of shards that one shard's part of the embedding implies; None if none fits."""
    if not embedding or not embedding[0] or vocab_size % embedding[0]:
        return None
    n_shards = vocab_size // embedding[0]
    return n_shards if n_shards <= MOST_SHARDS else None


def misfits(
    shards: Mapping[str, Mapping[str, DtypeAndShape]], expected: Mapping[str, Expected], n_shards: int
) -> dict[str, list[str]]:
    """For each shard, the `expected` tensors that are missing or have the wrong shape or dtype.

    `shards` holds each tensor's dtype name and shape.
    """
    held = {name for tensors in shards.values() for name in tensors}
    expected = {name: whole for name, whole in expected.items() if name in held or not whole.may_be_tied}
    parts = {name: whole._replace(shape=shard_shape(name, whole.shape, n_shards)) for name, whole in expected.items()}
    return {
        shard: [problem for name, part in parts.items() if (problem := misfit(name, tensors.get(name), part))]
        for shard, tensors in shards.items()
    }


def misfit(name: str, found: DtypeAndShape | None, expected: Expected) -> str | None:
    """The problem with a tensor that is missing or has the wrong shape or dtype; else None."""
    if found is None:
        is_needed = not expected.is_optional
        return f"{name} is missing, expected shape {expected.shape}{WHY_MISSING.get(name, '')}" if is_needed else None
    dtype, shape = found
    if expected.shape != shape and not (expected.is_column and expected.shape == (*shape, 1)):
        return f"{name} has shape {shape}, expected {expected.shape}"
    if dtype not in expected.dtypes:
        return f"{name} is {dtype}, expected {' or '.join(', '.join(expected.dtypes).rsplit(', ', 1))}"
    return None


def dtypes_and_shapes(tensors: Mapping[str, "Tensor"]) -> dict[str, DtypeAndShape]:
    """The dtype names and shapes of tensors, as `misfits` takes them."""
    return {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}


def is_ignored(name: str) -> bool:
    """Whether this tensor may be in the files although no model needs it."""
    return IGNORED.fullmatch(name) is not None


def strangers(tensors: Iterable[str], expected: Collection[str]) -> list[str]:
    """The names of tensors that are not part of the model."""
    return [name for name in tensors if name not in expected and not is_ignored(name)]
