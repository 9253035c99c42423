"""Which part of each tensor a process holds, and where it is in the shards.

Heads, feed-forward features and vocabulary are distributed in order: process r of W holds the r-th
part. Parts are ranges along the dimension in which Meta's shards are split, so any number of shards
works with any number of processes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from llama_ref.args import ModelArgs
from llama_ref.errors import RequestError

# The dimension in which Meta splits matrices; every shard contains all other tensors (the norms) whole.
SPLIT_DIM = {
    "tok_embeddings": 0,
    "output": 0,
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "w1": 0,
    "w3": 0,
    "wo": 1,
    "w2": 1,
    "learnable_embedding": 0,
    "_linear": 0,
    "c_fc": 0,
    "c_fc.bias": 0,
    "c_proj": 1,
    "vision_projection": 0,
    "vision_projection.bias": 0,
}

PARTS = (".weight", ".scales", ".zeros")  # suffixes of a matrix's tensors in Meta's names


def split_dim(name: str) -> int | None:
    """The dimension along which shards split a tensor ("layers.3.attention.wo.weight" -> 1).

    None: not split.
    Scales are split like their matrix. Of a low-rank matrix B A, A is split with the inputs, B with
    the outputs.
    """
    matrix, _, factor = name.partition(".adaptor.")
    dim = SPLIT_DIM.get(_kind(matrix))
    if factor:
        return dim if factor.startswith("A" if dim == 1 else "B") else None
    return dim


@dataclass(frozen=True)
class Share:
    """One process's part of every matrix (`rank` of `world_size`) in its pipeline stage."""

    rank: int = 0
    world_size: int = 1
    stage: int = 0
    n_stages: int = 1

    @property
    def is_first_stage(self) -> bool:
        """Whether this stage has the embedding."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this stage has the final norm and the output."""
        return self.stage == self.n_stages - 1

    def slice_of(self, total: int) -> range:
        """The range of `total` items in this share; sizes of shares differ by at most one."""
        return _nth(self.rank, self.world_size, total)

    def layers(self, n_layers: int) -> range:
        """The layers of this stage."""
        return _nth(self.stage, self.n_stages, n_layers)


WHOLE = Share()


def _nth(n: int, parts: int, total: int) -> range:
    return range(n * total // parts, (n + 1) * total // parts)


def check_divisible(args: ModelArgs, share: Share) -> None:
    """Raise RequestError unless query heads divide evenly and no stage is empty."""
    world_size = share.world_size
    if share.n_stages > args.n_layers:
        raise RequestError(f"{args.n_layers} layers cannot fill {share.n_stages} pipeline stages; use {args.n_layers} or fewer")
    if args.n_heads % world_size:
        possible = ", ".join(str(n) for n in range(1, args.n_heads + 1) if args.n_heads % n == 0)
        raise RequestError(
            f"{world_size} processes cannot hold equal parts of {args.n_heads} query heads; start one of {possible} processes"
        )


def kv_heads(args: ModelArgs, share: Share) -> list[int]:
    """The key/value heads that a share needs, one for each equally large group of its query heads.

    If the border of a share splits one of the model's groups, smaller groups are used, and some
    heads occur twice.
    """
    heads = share.slice_of(args.n_heads)
    group = args.n_heads // args.n_kv_heads
    return [head // group for head in heads[:: math.gcd(group, len(heads))]]


def wanted_ranges(name: str, args: ModelArgs, share: Share) -> list[range] | None:
    """The ranges of a tensor that a share holds along `split_dim(name)`, in storage order.

    None: the whole tensor.
    """
    kind = _kind(name)
    if kind not in SPLIT_DIM or is_shared(name):
        return None
    if kind in ("wk", "wv"):
        return _joined([_scaled(range(head, head + 1), args.head_dim) for head in kv_heads(args, share)])
    if kind in ("wq", "wo"):
        return [_scaled(share.slice_of(args.n_heads), args.head_dim)]
    if kind in ("w1", "w2", "w3"):
        return [share.slice_of(args.ffn_dim)]
    return [share.slice_of(args.vocab_size)]


def shard_ranges(name: str, shape: tuple[int, ...], args: ModelArgs, share: Share) -> list[range] | None:
    """The ranges of a tensor in a shard.

    Unlike processes (`wanted_ranges`), shards also split the vision encoder.
    """
    dim = split_dim(name)
    return [share.slice_of(shape[dim])] if dim is not None and is_shared(name) else wanted_ranges(name, args, share)


def is_shared(name: str) -> bool:
    """Whether every process holds the whole tensor, as for the vision encoder."""
    return name.startswith(("vision_model.", "learnable_embedding."))


def part_shape(name: str, whole: tuple[int, ...], ranges: list[range] | None) -> tuple[int, ...]:
    """The shape of the part of a tensor given by `ranges`."""
    if ranges is None:
        return whole
    size = sum(map(len, ranges))
    return tuple(size if axis == split_dim(name) else length for axis, length in enumerate(whole))


def places(ranges: list[range], shard_size: int) -> Iterator[tuple[int, range]]:
    """Split ranges at the borders of shards of `shard_size`.

    Yields (shard number, range within the shard).
    """
    for wanted in ranges:
        start = wanted.start
        while start < wanted.stop:
            shard, begin = divmod(start, shard_size)
            end = min(shard_size, begin + wanted.stop - start)
            yield shard, range(begin, end)
            start += end - begin


def _kind(name: str) -> str:
    for part in PARTS:
        name = name.removesuffix(part)
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1] == "bias" else parts[-1:])


def _scaled(heads: range, width: int) -> range:
    return range(heads.start * width, heads.stop * width)


def _joined(ranges: list[range]) -> list[range]:
    """Merge adjacent ranges."""
    out: list[range] = []
    for each in ranges:
        if out and out[-1].stop == each.start:
            out[-1] = range(out[-1].start, each.stop)
        else:
            out.append(each)
    return out
