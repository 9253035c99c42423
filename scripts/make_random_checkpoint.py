"""Make a checkpoint of random weights in Meta's layout, in a release's shape or any other.

    python scripts/make_random_checkpoint.py --like Llama3.2-1B --out DIR [--shards N] [--seed S] [--n_layers 2 …]

Any key of params.json is a flag that replaces the release's value; None removes the key. A seed
gives the same model for any number of shards. Options:

    --tokenizer PATH   tokenizer.model to copy (default for Llama 3's vocabulary: that of llama-models)
    --dtype bfloat16   or float16, float32
    --tied             one matrix for embedding and output (default for the 1B and 3B)
    --weights fp8      feed-forward layers in float8, as the 405B has them; int8: the 8B guard's folder
                       (default: as the release)
    --force            replace an existing folder
"""

import difflib
import hashlib
import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.folder import shard_name
from llama_ref.checkpoint.formats.atomic import new_folder, write_params, write_sums
from llama_ref.checkpoint.formats.lazy_tensor import LazyTensor
from llama_ref.checkpoint.formats.pth_writer import write_pth
from llama_ref.checkpoint.formats.safetensors_writer import write_safetensors
from llama_ref.checkpoint.hf.bitsandbytes import guard_args
from llama_ref.checkpoint.hf.config import make_config
from llama_ref.checkpoint.meta_quantized.kinds import KIND_OF_WEIGHTS, Kind, kind_of, scales_name, tensors_of
from llama_ref.checkpoint.releases import Release, find_release
from llama_ref.checkpoint.shapes import EMBEDDING, OUTPUT, name_in_shards, shard_shape
from llama_ref.checkpoint.verify.presence import checkpoint_files
from llama_ref.device import DTYPES
from llama_ref.errors import CheckpointError, LlamaRefError, RequestError
from llama_ref.files import check_head
from llama_ref.parallel.sharding import split_dim
from llama_ref.tokenizer import N_SPECIAL, read_ranks
from quantized_layouts import cast_rows, fp8_tensors, int4_tensors, int8_tensors

LLAMA_3_VOCAB = 128256
PARAMS_KEYS = [key for key in ModelArgs.__dataclass_fields__ if key != "extra"]
BLOCK_VALUES = 1 << 20  # drawn at a time, in float32


def make_random_checkpoint(
    out: str | Path,
    params: Mapping[str, Any],
    *,
    shards: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: str | Path | None = None,
    tied: bool = False,
    kind: Kind | None = None,
    force: bool = False,
) -> Path:
    """Write the folder `out`: params.json, random weights, a checklist, and `tokenizer` if given.

    `kind` FP8 gives the layout of the 405B, INT8 that of the 8B guard, a Hugging Face folder.
    quantization_args in params.json give the layout of an int4 release.

    Uses about as much memory as one shard's part of the largest tensor. Raises RequestError for a
    shape that cannot be split into `shards` or a tokenizer with another vocabulary, CheckpointError
    if the folder cannot be written.
    """
    args = ModelArgs.from_dict(params)
    kind = kind or kind_of(args)
    _check_makeable(args, kind, shards)
    if tokenizer is not None:
        tokenizer = Path(tokenizer).expanduser()
        _check_vocabulary(tokenizer, args.vocab_size)
    files = {}
    for rank in range(shards):
        files |= _shard(args, kind, rank, shards, seed, dtype, tied)
    aliases = {name_in_shards(OUTPUT, args): name_in_shards(EMBEDDING, args)} if tied and kind is Kind.PLAIN else {}
    with new_folder(out, force=force, n_bytes=sum(tensor.nbytes for part in files.values() for tensor in part)) as folder:
        if kind is not Kind.INT8:
            write_params(folder, params)
        elif args != guard_args():
            _write_config(folder, args)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / "tokenizer.model")
        for name, tensors in files.items():
            _write(folder / name, tensors, aliases if name.startswith("consolidated") else {})
        write_sums(folder, checkpoint_files(folder))
    return Path(out)


def _shard(
    args: ModelArgs, kind: Kind, rank: int, shards: int, seed: int, dtype: torch.dtype, tied: bool
) -> dict[str, list[LazyTensor]]:
    """The files of one shard, by name."""
    whole = tensors_of(args, kind)
    own = {name: tensor._replace(shape=shard_shape(name, tensor.shape, shards)) for name, tensor in whole.items()}

    def draw(name: str) -> Iterator[Tensor]:
        return _random_part(name, whole[name].shape, rank, shards, seed)

    if kind is Kind.INT8:
        return {"model.safetensors": int8_tensors(own, draw, dtype)}
    if kind is Kind.INT4:
        return {shard_name(rank): int4_tensors(own, draw, dtype)}
    if kind is Kind.FP8:
        shard, scales = fp8_tensors(own, draw, dtype, rank)
        return {shard_name(rank): shard, scales_name(rank): scales}
    held = [name for name in own if not (tied and name == "output.weight")]
    parts = [
        LazyTensor(name_in_shards(name, args), own[name].shape, dtype, partial(cast_rows, draw, name, dtype)) for name in held
    ]
    return {shard_name(rank): parts}


def _write(path: Path, tensors: list[LazyTensor], aliases: Mapping[str, str]) -> None:
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(path.name, total=sum(tensor.nbytes for tensor in tensors))
        if path.suffix == ".safetensors":
            write_safetensors(path, tensors, lambda n_bytes: progress.advance(task, n_bytes))
        else:
            write_pth(path, tensors, aliases, lambda n_bytes: progress.advance(task, n_bytes))


def _write_config(folder: Path, args: ModelArgs) -> None:
    """Write a config.json with bitsandbytes' section."""
    config = make_config(args, tied=False, dtype=torch.bfloat16, bos=0, eos=[1])
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _random_part(name: str, shape: tuple[int, ...], rank: int, shards: int, seed: int) -> Iterator[Tensor]:
    """One shard's part of a tensor, in float32 and in blocks of rows.

    The tensor is drawn in blocks of rows (of columns, if shards split columns), each with its own
    seed. So a part needs only the blocks that it overlaps, and does not depend on the number of
    parts.
    """
    dim = split_dim(name) or 0
    rank, shards = (rank, shards) if split_dim(name) is not None else (0, 1)  # one whole part
    if len(shape) == 1:  # a norm or a gate: near 1, but no two equal; a bias: near 0
        size = shape[0] // shards
        yield (not name.endswith("bias")) + 0.1 * _block(shape, seed, name, 0)[rank * size : (rank + 1) * size]
        return
    if len(shape) > 2:  # tables of positions, whole in every shard
        rows = _random_part(name, (math.prod(shape[:-1]), shape[-1]), 0, 1, seed)
        yield torch.cat(list(rows)).view(shape)
        return
    scale = 1 / math.sqrt(shape[1])  # by the fan-in: keeps activations near 1, and embeddings at norm 1
    slices = _slices(name, shape[dim], shape[1 - dim], rank, shards, seed)
    if dim == 0:
        yield from (rows * scale for rows in slices)
    else:  # rows are complete only after all columns are drawn
        part = torch.empty(shard_shape(name, shape, shards))
        filled = 0
        for columns in slices:  # (some of the part's columns, rows)
            part[:, filled : filled + len(columns)] = (columns * scale).T
            filled += len(columns)
        yield part


def _slices(name: str, length: int, width: int, rank: int, shards: int, seed: int) -> Iterator[Tensor]:
    """One shard's part of each block (n, width) in which a tensor (length, width) is drawn."""
    size = length // shards
    start, stop = rank * size, (rank + 1) * size
    step = max(1, BLOCK_VALUES // width)
    for first in range(start - start % step, stop, step):
        block = _block((min(step, length - first), width), seed, name, first)
        yield block[max(start - first, 0) : stop - first]


def _block(shape: tuple[int, ...], seed: int, name: str, first: int) -> Tensor:
    """Standard normal float32 values that depend only on seed, tensor name and position."""
    digest = hashlib.sha256(f"{seed} {name} {first}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return torch.randn(shape, generator=generator)


def _check_makeable(args: ModelArgs, kind: Kind, shards: int) -> None:
    _check_even(args, shards)
    if kind in (Kind.INT4, Kind.INT8) and shards > 1:
        raise RequestError(f"{kind.value} releases have one shard; leave --shards out")


def _check_even(args: ModelArgs, shards: int) -> None:
    if not isinstance(shards, int) or shards < 1:
        raise RequestError(f"--shards is {shards!r}, expected a positive whole number")
    split = {key: getattr(args, key) for key in ("n_heads", "n_kv_heads", "vocab_size", "ffn_dim")}
    uneven = [f"{key} {value}" for key, value in split.items() if value % shards]
    if uneven:
        raise RequestError(f"{shards} shards do not divide {', '.join(uneven)}; every shard needs an equal part of these")


def _check_vocabulary(tokenizer: Path, vocab_size: int) -> None:
    check_head(tokenizer, "a tokenizer")
    try:
        n_ranks = len(read_ranks(tokenizer))
    except CheckpointError as error:
        raise RequestError(f"{tokenizer} is not in tiktoken's format, like Llama 3's: {error}") from error
    if n_ranks + N_SPECIAL != vocab_size:
        raise RequestError(
            f"{tokenizer} has {n_ranks:,} tokens and {N_SPECIAL} special ones, but vocab_size is {vocab_size:,}; "
            f"give --vocab_size {n_ranks + N_SPECIAL} or another --tokenizer"
        )


def main(
    out: str,
    like: str | None = None,
    shards: int | None = None,
    seed: int = 0,
    tokenizer: str | None = None,
    dtype: str = "bfloat16",
    tied: bool | None = None,
    weights: str | None = None,
    force: bool = False,
    **params: Any,
) -> None:
    """Write the folder OUT of random weights; every key of params.json is a flag too."""
    try:
        release = _makeable(find_release(like)) if like else None
        params = _overridden(release.params if release else {}, params)
        make_random_checkpoint(
            str(out),
            params,
            shards=shards or (release.shards if release else 1),
            seed=seed,
            dtype=_dtype(dtype),
            tokenizer=_tokenizer(tokenizer, params),
            tied=bool(release and release.tied) if tied is None else tied,
            kind=_kind(weights, release),
            force=force,
        )
    except LlamaRefError as error:
        print(f"make_random_checkpoint: {error}", file=sys.stderr)
        sys.exit(2)
    print(out)


def _makeable(release: Release) -> Release:
    if "hidden_dim" in release.params:
        raise RequestError(f"{release.name} is an ExecuTorch program, which this script does not make; use another release")
    return release


def _overridden(params: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for key in changes.keys() - set(PARAMS_KEYS):
        close = difflib.get_close_matches(key, PARAMS_KEYS, n=1)
        hint = f"did you mean --{close[0]}?" if close else f"known keys: {', '.join(PARAMS_KEYS)}"
        raise RequestError(f"--{key} is not a key of params.json; {hint}")
    return {key: value for key, value in {**params, **changes}.items() if value is not None}


def _kind(weights: str | None, release: Release | None) -> Kind | None:
    """The kind of release, if params.json does not show it."""
    if weights not in (None, "fp8", "int8"):
        raise RequestError(f"--weights is {weights!r}, expected fp8 or int8")
    kind = Kind(weights) if weights else KIND_OF_WEIGHTS[release.weights] if release else None
    return kind if kind in (Kind.FP8, Kind.INT8) else None


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise RequestError(f"--dtype is {name!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _tokenizer(given: str | None, params: Mapping[str, Any]) -> Path | None:
    """The tokenizer.model to copy: the given one, or llama-models' for Llama 3's vocabulary."""
    if given is not None:
        return Path(str(given))
    if params.get("vocab_size") != LLAMA_3_VOCAB:
        print("no --tokenizer given: the folder will have no tokenizer.model", file=sys.stderr)
        return None
    package = importlib.util.find_spec("llama_models")
    if package is None:
        note = (
            "no --tokenizer given, and llama-models (with Llama 3's) is not installed: the folder will have no tokenizer.model"
        )
        print(note, file=sys.stderr)
        return None
    path = Path(package.submodule_search_locations[0]) / "llama3" / "tokenizer.model"
    print(f"no --tokenizer given: using {path}", file=sys.stderr)
    return path


if __name__ == "__main__":
    import fire  # only the command line needs it

    fire.Fire(main)
