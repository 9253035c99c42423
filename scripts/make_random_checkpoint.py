"""Make a folder of random weights in exactly Meta's layout, for a release's shape or any other.

    python scripts/make_random_checkpoint.py --like Llama3.2-1B --out DIR [--shards N] [--seed S] [--n_layers 2 …]

Any key of params.json may be given and replaces the release's; a key given as None is left out. The same seed gives the same
model whatever the number of shards. Options:

    --tokenizer PATH   tokenizer.model to copy; without it, that of the package llama-models where the vocabulary is Llama 3's
    --dtype bfloat16   or float16, float32
    --tied             one matrix for embedding and output, as the 1B and 3B have it (which do so without being told)
    --force            replace the folder if it is there
"""

import difflib
import hashlib
import importlib.util
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fire
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.presence import checkpoint_files
from llama_ref.checkpoint.shapes import expected_shapes, other_kind
from llama_ref.checkpoint.slices import split_dim
from llama_ref.checkpoint.writing import new_folder, write_params, write_sums
from llama_ref.device import DTYPES
from llama_ref.errors import CheckpointError, LlamaRefError, RequestError
from llama_ref.files import refuse_impostor
from llama_ref.releases import Release, find_release
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
    """Write the folder `out`: params.json as given, random weights for it, a true checklist, and `tokenizer` copied if given.

    Memory stays far below one shard: its tensors are filled in mapped files, which take as much disk again while a shard is
    written. Raises RequestError for a shape that does not split into `shards`, or a tokenizer of another vocabulary.
    """
    args = ModelArgs.from_dict(params)
    _refuse_other_kinds(args)
    shapes = expected_shapes(args)
    _refuse_uneven(args, shards)
    if tokenizer is not None:
        tokenizer = Path(tokenizer).expanduser()
        _refuse_other_vocabulary(tokenizer, args.vocab_size)
    with new_folder(out, force=force) as folder:
        write_params(folder, params)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / "tokenizer.model")
        scratch = folder / "scratch"
        for rank in range(shards):
            scratch.mkdir()
            torch.save(_shard(shapes, rank, shards, seed, dtype, tied, scratch), folder / f"consolidated.{rank:02d}.pth")
            shutil.rmtree(scratch)
        write_sums(folder, checkpoint_files(folder))
    return Path(out)


def _shard(
    shapes: Mapping[str, tuple[int, ...]], rank: int, shards: int, seed: int, dtype: torch.dtype, tied: bool, scratch: Path
) -> dict[str, Tensor]:
    names = [name for name in shapes if not (tied and name == "output.weight")]
    console = Console(stderr=True)
    weights = {
        name: _random_part(name, shapes[name], rank, shards, seed, dtype, scratch / name)
        for name in track(names, f"consolidated.{rank:02d}.pth", console=console, disable=not console.is_terminal)
    }
    if tied:
        weights["output.weight"] = weights["tok_embeddings.weight"]  # saved once, under both names
    return weights


def _random_part(
    name: str, shape: tuple[int, ...], rank: int, shards: int, seed: int, dtype: torch.dtype, scratch: Path
) -> Tensor:
    """One shard's part of a tensor, in a mapped file.

    The whole tensor is made of blocks of rows (of columns, where shards cut columns), each drawn from its own seed: a part
    needs only the blocks that it touches, and comes out the same however many parts there are.
    """
    if len(shape) == 1:  # a norm; every shard has all of it. Near 1, but not so near that two of them could be confused
        return (1 + 0.1 * _block(shape, seed, name, 0)).to(dtype)
    dim = split_dim(name)
    length, width = shape[dim], shape[1 - dim]
    size = length // shards
    start, stop = rank * size, (rank + 1) * size
    part_shape = (size, width) if dim == 0 else (width, size)
    part = torch.from_file(str(scratch), shared=True, size=size * width, dtype=dtype).view(part_shape)
    scale = 1 / math.sqrt(shape[1])  # keeps activations near 1; shape[1] is fan-in, and an embedding's norm comes out as 1
    step = max(1, BLOCK_VALUES // width)
    for first in range(start - start % step, stop, step):
        block = _block((min(step, length - first), width), seed, name, first) * scale
        low, high = max(first, start), min(first + len(block), stop)
        place = part.narrow(dim, low - start, high - low)
        place.copy_(block[low - first : high - first] if dim == 0 else block[low - first : high - first].T)
    return part


def _block(shape: tuple[int, ...], seed: int, name: str, first: int) -> Tensor:
    """Standard normal float32 values that depend on seed, tensor name and place alone."""
    digest = hashlib.sha256(f"{seed} {name} {first}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return torch.randn(shape, generator=generator)


def _refuse_other_kinds(args: ModelArgs) -> None:
    kind = other_kind(args)
    if kind:
        raise RequestError(f"these params are of {kind}, which is not made here")


def _refuse_uneven(args: ModelArgs, shards: int) -> None:
    if not isinstance(shards, int) or shards < 1:
        raise RequestError(f"--shards is {shards!r}, expected a positive whole number")
    split = {key: getattr(args, key) for key in ("n_heads", "n_kv_heads", "vocab_size", "ffn_dim")}
    uneven = [f"{key} {value}" for key, value in split.items() if value % shards]
    if uneven:
        raise RequestError(f"{shards} shards do not divide {', '.join(uneven)}; every shard holds an equal part of these")


def _refuse_other_vocabulary(tokenizer: Path, vocab_size: int) -> None:
    refuse_impostor(tokenizer, "a tokenizer")
    try:
        n_ranks = len(read_ranks(tokenizer))
    except CheckpointError as error:
        raise RequestError(f"{tokenizer} is not in tiktoken's form, as Llama 3's is: {error}") from error
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
        raise RequestError(f"{release.name} is {kind} release, which is not made here; take a bf16 text release")
    return release


def _overridden(params: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for key in changes.keys() - set(PARAMS_KEYS):
        close = difflib.get_close_matches(key, PARAMS_KEYS, n=1)
        hint = f"did you mean --{close[0]}?" if close else f"there are {', '.join(PARAMS_KEYS)}"
        raise RequestError(f"--{key} is no key of params.json; {hint}")
    return {key: value for key, value in {**params, **changes}.items() if value is not None}


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise RequestError(f"--dtype is {name!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _tokenizer(given: str | None, params: Mapping[str, Any]) -> Path | None:
    """The tokenizer.model to copy: the given one, else llama-models' for Llama 3's vocabulary, else none for a made-up one."""
    if given is not None:
        return Path(str(given))
    if params.get("vocab_size") != LLAMA_3_VOCAB:
        print("no --tokenizer given: the folder will have no tokenizer.model", file=sys.stderr)
        return None
    package = importlib.util.find_spec("llama_models")
    if package is None:
        note = (
            "no --tokenizer given and no package llama-models, which carries Llama 3's: the folder will have no tokenizer.model"
        )
        print(note, file=sys.stderr)
        return None
    path = Path(package.submodule_search_locations[0]) / "llama3" / "tokenizer.model"
    print(f"no --tokenizer given: taking {path}", file=sys.stderr)
    return path


if __name__ == "__main__":
    fire.Fire(main)
