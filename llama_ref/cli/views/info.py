"""A checkpoint in numbers, as `llama-ref info` prints them."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rich.table import Column, Table

from llama_ref.checkpoint.folder import CheckpointFolder
from llama_ref.checkpoint.quantized_reader import scheme_of
from llama_ref.checkpoint.reader import is_tied
from llama_ref.checkpoint.verify.report import human_bytes
from llama_ref.cli.terminal import print_rich
from llama_ref.plan import count_parameters

CONTEXTS = (2048, 8192, 32768, 131072)  # tokens; the last is what Llama 3.1 and later were trained for
DTYPE_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class ModelInfo:
    """A checkpoint in numbers. Bytes of weights by dtype, and of one sequence's KV cache by context length (bfloat16)."""

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
    weight_bytes: dict[str, int]
    kv_cache_bytes: dict[int, int]


def describe(folder: CheckpointFolder) -> ModelInfo:
    """Read params.json and the shards' directories; no weights. Raises CheckpointError."""
    args = folder.read_args()
    tied = is_tied(folder)
    parameters = count_parameters(args, tied)
    scheme = str(scheme_of(folder, args)) if folder.is_quantized else None
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
        weight_bytes={scheme: folder.shard_bytes} if scheme else {dtype: parameters * n for dtype, n in DTYPE_BYTES.items()},
        kv_cache_bytes={context: context * per_token for context in CONTEXTS},
        **{key: getattr(args, key) for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim")},
        **{key: getattr(args, key) for key in ("vocab_size", "rope_theta", "rope_scaling_factor", "norm_eps")},
    )


def print_info(info: ModelInfo, *, as_json: bool) -> None:
    """Print one checkpoint's numbers: a table, or JSON in bytes and tokens."""
    if as_json:
        print(json.dumps(asdict(info), indent=2))
        return
    table = Table("name", Column("value", overflow="fold"), title=info.name, title_justify="left", show_header=False)
    for name, value in _info_lines(info):
        table.add_row(name, value)
    print_rich(table)


def _info_lines(info: ModelInfo) -> Iterator[tuple[str, str]]:
    yield "folder", info.path
    yield "parameters", f"{info.parameters:,}" + (" (output tied to the embedding)" if info.tied_output else "")
    yield "layers", f"{info.n_layers} of width {info.dim:,}"
    yield "attention", f"{info.n_heads} query heads, {info.n_kv_heads} key/value heads, {info.head_dim} wide"
    yield "feed-forward", f"{info.ffn_dim:,} wide"
    yield "vocabulary", f"{info.vocab_size:,} tokens"
    scaling = f", frequencies scaled by {info.rope_scaling_factor:g}" if info.rope_scaling_factor != 1 else ""
    yield "RoPE", f"theta {info.rope_theta:,.0f}{scaling}"
    yield "files", f"{info.shards} shard{'s' * (info.shards != 1)}, {human_bytes(info.shard_bytes)}"
    yield "checklist", "there" if info.checklist else "none (nothing says what the files should be)"
    yield "weights in memory", ", ".join(f"{human_bytes(size)} in {dtype}" for dtype, size in info.weight_bytes.items())
    contexts = (f"{human_bytes(size)} at {tokens:,} tokens" for tokens, size in info.kv_cache_bytes.items())
    yield "KV cache, a sequence", "\n".join(contexts)
