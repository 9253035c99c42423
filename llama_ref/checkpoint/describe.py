"""A checkpoint in numbers: shape, files and memory."""

from dataclasses import dataclass

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.folder import CheckpointFolder
from llama_ref.checkpoint.hf.conventions import foreign_template
from llama_ref.checkpoint.quantized_reader import scheme_of
from llama_ref.checkpoint.reader import is_tied, stored_kind
from llama_ref.parallel.sharding import WHOLE
from llama_ref.plan import Model, count_encoder, count_parameters, image_bytes, weight_bytes

CONTEXTS = (2048, 8192, 32768, 131072)  # tokens; the last is what Llama 3.1 and later were trained for
DTYPE_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class VisionInfo:
    """The vision part of a checkpoint in numbers.

    `tile` is a tile's side in pixels, `tiles` the most per image. `image_bytes` is the size of the
    keys and values of one image with that many tiles, in bfloat16.
    """

    tile: int
    tiles: int
    encoder_layers: int
    encoder_parameters: int
    cross_attention_layers: int
    image_bytes: int


@dataclass(frozen=True)
class ModelInfo:
    """A checkpoint in numbers.

    `foreign_chat_template`: the folder's chat template does not write Llama 3's format, which is
    used regardless. `weight_bytes` is by dtype; `kv_cache_bytes` is by context length, for one
    sequence in bfloat16.
    """

    name: str
    path: str
    parameters: int
    tied_output: bool
    quantization: str | None
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    rope_theta: float
    rope_scaling_factor: float
    norm_eps: float
    shards: int
    shard_bytes: int
    checklist: bool
    foreign_chat_template: bool
    weight_bytes: dict[str, int]
    kv_cache_bytes: dict[int, int]
    vision: VisionInfo | None


def describe(folder: CheckpointFolder) -> ModelInfo:
    """Describe a folder from its params.json and the headers of its shards.

    Reads only the weights that `is_tied` reads. Raises CheckpointError.
    """
    args = folder.read_args()
    tied = is_tied(folder)
    parameters = count_parameters(args, tied)
    kind = stored_kind(folder, args)
    model = Model(folder.name, str(folder.path), args, tied, 0, kind=kind, shards=len(folder.shards))
    scheme = str(scheme_of(folder, args)) if folder.is_quantized else model.quantization
    if scheme is None:
        in_memory = {dtype: parameters * n for dtype, n in DTYPE_BYTES.items()}
    else:
        in_memory = {scheme: folder.shard_bytes if folder.is_quantized else weight_bytes(model, WHOLE, DTYPE_BYTES["bfloat16"])}
    per_token = 2 * args.n_layers * args.n_kv_heads * args.head_dim * DTYPE_BYTES["bfloat16"]  # keys and values
    return ModelInfo(
        name=folder.name,
        path=str(folder.path),
        parameters=parameters,
        tied_output=tied,
        quantization=scheme,
        shards=len(folder.shards),
        shard_bytes=folder.shard_bytes,
        checklist=folder.checklist is not None,
        foreign_chat_template=foreign_template(folder.path) is not None,
        weight_bytes=in_memory,
        kv_cache_bytes={context: context * per_token for context in CONTEXTS},
        dim=args.dim,
        n_layers=args.n_layers,
        n_heads=args.n_heads,
        n_kv_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        ffn_dim=args.ffn_dim,
        vocab_size=args.vocab_size,
        rope_theta=args.rope_theta,
        rope_scaling_factor=args.rope_scaling_factor,
        norm_eps=args.norm_eps,
        vision=_describe_vision(args),
    )


def _describe_vision(args: ModelArgs) -> VisionInfo | None:
    if args.vision_chunk_size is None:
        return None
    return VisionInfo(
        tile=args.vision_chunk_size,
        tiles=args.vision_max_num_chunks,
        encoder_layers=args.vision_n_layers + args.vision_n_global_layers,
        encoder_parameters=count_encoder(args),
        cross_attention_layers=len(args.cross_layers),
        image_bytes=image_bytes(args, WHOLE, DTYPE_BYTES["bfloat16"]),
    )
