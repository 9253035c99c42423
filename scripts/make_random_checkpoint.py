"""Make a checkpoint of random weights in Meta's layout, in a release's shape or any other.

    python scripts/make_random_checkpoint.py --like Llama3.2-1B --out DIR [--shards N] [--seed S] [--n_layers 2 …]

Any key of params.json is a flag that replaces the release's value; None removes the key. A seed
gives the same model for any number of shards. Options:

    --tokenizer PATH   tokenizer.model to copy (default for Llama 3's vocabulary: that of llama-models)
    --dtype bfloat16   or float16, float32
    --tied             one matrix for embedding and output (default for the 1B and 3B)
    --force            replace an existing folder
"""

import difflib
import hashlib
import importlib.util
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
from llama_ref.checkpoint.formats.atomic import new_folder, write_params, write_sums
from llama_ref.checkpoint.formats.lazy_tensor import LazyTensor
from llama_ref.checkpoint.formats.pth_writer import write_pth
from llama_ref.checkpoint.releases import Release, find_release
from llama_ref.checkpoint.shapes import expected_shapes, other_kind, shard_shape
from llama_ref.checkpoint.verify.presence import checkpoint_files
from llama_ref.device import DTYPES
from llama_ref.errors import CheckpointError, LlamaRefError, RequestError
from llama_ref.files import check_head
from llama_ref.parallel.sharding import split_dim
from llama_ref.tokenizer import N_SPECIAL, read_ranks

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
    force: bool = False,
) -> Path:
    """Write the folder `out`: params.json, random weights, a checklist, and `tokenizer` if given.

    Uses about as much memory as one shard's part of the largest tensor. Raises RequestError for a
    shape that cannot be split into `shards` or a tokenizer with another vocabulary, CheckpointError
    if the folder cannot be written.
    """
    args = ModelArgs.from_dict(params)
    _check_kind(args)
    shapes = expected_shapes(args)
    _check_even(args, shards)
    if tokenizer is not None:
        tokenizer = Path(tokenizer).expanduser()
        _check_vocabulary(tokenizer, args.vocab_size)
    parts = [_shard(shapes, rank, shards, seed, dtype, tied) for rank in range(shards)]
    with new_folder(out, force=force, n_bytes=sum(tensor.nbytes for part in parts for tensor in part)) as folder:
        write_params(folder, params)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / "tokenizer.model")
        for rank, part in enumerate(parts):
            _write_shard(folder / f"consolidated.{rank:02d}.pth", part, tied)
        write_sums(folder, checkpoint_files(folder))
    return Path(out)


def _shard(
    shapes: Mapping[str, tuple[int, ...]], rank: int, shards: int, seed: int, dtype: torch.dtype, tied: bool
) -> list[LazyTensor]:
    return [
        LazyTensor(name, shard_shape(name, shape, shards), dtype, partial(_random_part, name, shape, rank, shards, seed, dtype))
        for name, shape in shapes.items()
        if not (tied and name == "output.weight")
    ]


def _write_shard(path: Path, tensors: list[LazyTensor], tied: bool) -> None:
    aliases = {"output.weight": "tok_embeddings.weight"} if tied else {}
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(path.name, total=sum(tensor.nbytes for tensor in tensors))
        write_pth(path, tensors, aliases, lambda n_bytes: progress.advance(task, n_bytes))


def _random_part(name: str, shape: tuple[int, ...], rank: int, shards: int, seed: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """One shard's part of a tensor, in blocks of rows.

    The tensor is drawn in blocks of rows (of columns, if shards split columns), each with its own
    seed. So a part needs only the blocks that it overlaps, and does not depend on the number of
    parts.
    """
    if len(shape) == 1:  # a norm, whole in every shard: near 1, but no two equal
        yield (1 + 0.1 * _block(shape, seed, name, 0)).to(dtype)
        return
    dim = split_dim(name)
    scale = 1 / math.sqrt(shape[1])  # by the fan-in: keeps activations near 1, and embeddings at norm 1
    slices = _slices(name, shape[dim], shape[1 - dim], rank, shards, seed)
    if dim == 0:
        yield from ((rows * scale).to(dtype) for rows in slices)
    else:  # rows are complete only after all columns are drawn
        part = torch.empty(shard_shape(name, shape, shards), dtype=dtype)
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


def _check_kind(args: ModelArgs) -> None:
    kind = other_kind(args)
    if kind:
        raise RequestError(f"these params are of {kind}, which this script does not make")


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
            force=force,
        )
    except LlamaRefError as error:
        print(f"make_random_checkpoint: {error}", file=sys.stderr)
        sys.exit(2)
    print(out)


def _makeable(release: Release) -> Release:
    kind = "a vision" if release.is_vision else f"an {release.weights}" if release.weights != "bf16" else None
    if kind:
        raise RequestError(f"{release.name} is {kind} release, which this script does not make; use a bf16 text release")
    return release


def _overridden(params: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for key in changes.keys() - set(PARAMS_KEYS):
        close = difflib.get_close_matches(key, PARAMS_KEYS, n=1)
        hint = f"did you mean --{close[0]}?" if close else f"known keys: {', '.join(PARAMS_KEYS)}"
        raise RequestError(f"--{key} is not a key of params.json; {hint}")
    return {key: value for key, value in {**params, **changes}.items() if value is not None}


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
