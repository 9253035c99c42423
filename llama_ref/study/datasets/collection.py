"""The index of a collected data set: its texts, their kept positions, and the shard of each text.

A folder has `index.json`, written first, and shards, each written atomically: a shard that exists is
complete. The texts are the distinct prompts, longest first. A shard has the kept positions of
successive texts in one dimension: a tensor (rows, …) for every name, and `tokens` (rows,).
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.files import read_json
from llama_ref.formatting import comma_list, dtype_name
from llama_ref.study.names import axes, is_of_key_heads, matching
from llama_ref.study.passes.pass_size import split_passes

INDEX = "index.json"
FORMAT = "llama_ref collection 2"
EARLIER_FORMAT = "llama_ref collection 1"  # without `edited`, and `model` is a digest of few weights: only read
INDEX_LIMIT_BYTES = 1 << 30
SHARD_BYTES = 64 << 20  # target size of a shard, held in memory; a shard has at least one pass
SHARD_PASSES = 32  # maximum per shard: a run that was killed repeats no more than these
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Shard:
    """A file with the texts `first` to `end` (exclusive)."""

    file: str
    first: int
    end: int


@dataclass(frozen=True)
class Collection:
    """The index of a collection: everything that is known before the first pass.

    `names` maps an activation's name to the shape of one position. `texts` are SHA-256 sums of ids,
    `lengths` their numbers of tokens, `positions` their kept positions. `prompts` has the number of
    each prompt's text. `edited` are the activations that patch, steer or others edited, None if
    the index does not say. Edits may be any function, so they cannot be compared with those of a later call.
    """

    model: str  # the digest of its weights
    names: dict[str, list[int]]
    dtype: str
    texts: list[str]
    lengths: list[int]
    positions: list[list[int]]
    prompts: list[int]
    shards: list[Shard]
    edited: list[str] | None

    @cached_property
    def offsets(self) -> list[int]:
        """The number of rows before each text, in all shards together; the last is the total."""
        return [0, *accumulate(map(len, self.positions))]

    @property
    def row_bytes(self) -> int:
        """Bytes of one position, its token id included."""
        numbers = sum(math.prod(shape) for shape in self.names.values())
        return 8 + numbers * DTYPES[self.dtype].itemsize

    def n_rows(self, shard: Shard) -> int:
        return self.offsets[shard.end] - self.offsets[shard.first]

    def rows_of(self, text: int) -> tuple[Shard, slice]:
        """The shard of a text, and its rows there."""
        shard = self.shards[bisect_right([each.first for each in self.shards], text) - 1]
        begin = self.offsets[text] - self.offsets[shard.first]
        return shard, slice(begin, begin + len(self.positions[text]))

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    def obstacle(self, found: "Collection") -> str | None:
        """Why a folder with the index `found` cannot be continued as this collection, in words; None if it can."""
        if found.edited is None:
            return "was begun by an earlier version of llama_ref, which did not record all weights and edits"
        if found.edited:
            return f"was collected with edits of {comma_list(found.edited, 4)}, which may differ now"
        if self.edited:
            return f"was collected without edits, and now {comma_list(self.edited, 4)} would be edited"
        words = {
            "model": "another model, or this one with other weights or in another dtype",
            "names": "other names",
            "dtype": "another dtype",
            "prompts": "other prompts",
            "texts": "other prompts",
        }
        words |= {"lengths": "other prompts", "positions": "other positions", "shards": "other shard sizes"}
        differing = [said for part, said in words.items() if getattr(self, part) != getattr(found, part)]
        return f"was collected with {differing[0]}" if differing else None


def plan(
    model: str,
    names: dict[str, list[int]],
    dtype: str,
    prompts: Sequence[Tensor],
    kept: Sequence[list[int]],
    edited: list[str],
) -> tuple[Collection, list[Tensor]]:
    """Make the index for prompts and their kept positions; return it with the ids of its texts."""
    sums = [hashlib.sha256(prompt.numpy().tobytes()).hexdigest() for prompt in prompts]
    first = {each: i for i, each in reversed(list(enumerate(sums)))}  # the prompt in which each text is first
    order = sorted(first, key=lambda each: (-len(prompts[first[each]]), first[each]))
    number = {each: i for i, each in enumerate(order)}
    texts = [prompts[first[each]] for each in order]
    lengths, positions = [len(text) for text in texts], [kept[first[each]] for each in order]
    unsplit = Collection(model, names, dtype, order, lengths, positions, [number[each] for each in sums], [], edited)
    return replace(unsplit, shards=_shards(unsplit)), texts


def _shards(collection: Collection) -> list[Shard]:
    """Divide texts into shards of whole passes."""
    shards: list[Shard] = []
    passes = list(split_passes(collection.lengths))
    begin = 0
    for i, some in enumerate(passes, 1):
        rows = collection.offsets[passes[i].stop if i < len(passes) else some.stop] - collection.offsets[passes[begin].start]
        is_full = rows * collection.row_bytes > SHARD_BYTES or i - begin == SHARD_PASSES
        if is_full or i == len(passes):
            shards.append(Shard(f"shard-{len(shards):05}.safetensors", passes[begin].start, some.stop))
            begin = i
    return shards


def row_shapes(args: ModelArgs, globs: str | Sequence[str]) -> dict[str, list[int]]:
    """Names that globs match, with the shape of one position.

    Raises RequestError for names without positions, or whose size at a position depends on the text.
    """
    sizes = {"dim": args.dim, "head_dim": args.head_dim, "ffn_dim": args.ffn_dim, "vocab": args.vocab_size}
    shapes = {}
    for name in matching(args, globs):
        own_axes = axes(name)
        if own_axes[:2] != ("batch", "position") or "key_position" in own_axes or name.startswith("cross_layers."):
            raise RequestError(
                f"{name} cannot be collected: it has no fixed number of values at each token of a text; choose others,"
                " such as layers.*.residual_post, or record it with study.trace"
            )
        heads = args.n_kv_heads if is_of_key_heads(name) else args.n_heads
        shapes[name] = [heads if axis == "head" else sizes[axis] for axis in own_axes[2:]]
    return shapes


def check_dtype(dtype: str | torch.dtype) -> str:
    """The name of a dtype to store. Raises RequestError for an unsupported one."""
    name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else dtype
    if name not in DTYPES:
        raise RequestError(f"dtype is {name!r:.40}, expected {', '.join(DTYPES)}")
    return name


def read_index(folder: Path) -> Collection:
    """A folder's index. Raises CheckpointError if it is missing or damaged."""
    path = folder / INDEX
    found = read_json(path, INDEX_LIMIT_BYTES, "a collection's index")
    if not isinstance(found, Mapping) or found.get("format") not in (FORMAT, EARLIER_FORMAT):
        raise CheckpointError(f"{path} is not an index of a collection, expected one that study.collect wrote")
    if found["format"] == EARLIER_FORMAT:
        found = {**found, "edited": None}
    try:
        parts = {name: found[name] for name in Collection.__dataclass_fields__}
        parts["shards"] = [Shard(str(each["file"]), int(each["first"]), int(each["end"])) for each in parts["shards"]]
        collection = Collection(**parts)
        _check(collection)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): remove the folder and collect again") from error
    return collection


def _check(collection: Collection) -> None:
    """Raise ValueError unless an index's parts are consistent."""
    n = len(collection.texts)
    if not len(collection.lengths) == len(collection.positions) == n or not collection.shards:
        raise ValueError("its lists differ in length")
    borders = [collection.shards[0].first, *(shard.end for shard in collection.shards)]
    if borders != [0, *(shard.first for shard in collection.shards[1:]), n]:
        raise ValueError("its shards have gaps")
    edited = [] if collection.edited is None else collection.edited
    if not isinstance(edited, list) or not all(isinstance(name, str) for name in edited):
        raise ValueError("its edited names are not a list of names")
    if any(Path(shard.file).name != shard.file for shard in collection.shards):
        raise ValueError("a shard is outside its folder")
    if any(not 0 <= text < n for text in collection.prompts) or collection.dtype not in DTYPES:
        raise ValueError("a prompt or the dtype is unknown")
