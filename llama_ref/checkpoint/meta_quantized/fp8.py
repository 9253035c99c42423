"""Make a model's matrices from the shards and scales of Llama 3.1 405B in fp8.

Every shard was quantized separately. Each row of w1 and w3 is in one shard, with its scale. w2 is
split along its inputs, so each shard has its own scale for every row. Shards are therefore kept as
separate blocks of a matrix, and each block is multiplied by its own scales.
"""

import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.advice.missing_file import with_hint
from llama_ref.checkpoint.folder import CheckpointFolder
from llama_ref.checkpoint.loading.to_device import Target
from llama_ref.checkpoint.meta_quantized.kinds import is_fp8, scale_key, scales_name, wrong_scales
from llama_ref.checkpoint.meta_quantized.odd_numbers import odd
from llama_ref.checkpoint.reader import Stored, TensorSlice, check_problems, join, read_shard
from llama_ref.checkpoint.shapes import dtypes_and_shapes, expected_shapes
from llama_ref.errors import CheckpointError
from llama_ref.parallel.sharding import places, split_dim
from llama_ref.quantization.fp8 import ColumnBlocks, Fp8Linear
from llama_ref.quantization.linear import QuantizedMatrix, RowBlocks


class StoredFp8:
    """An fp8 release's matrices; `rounds_inputs`: round inputs like Meta's code."""

    tied = False

    def __init__(self, folder: CheckpointFolder, args: ModelArgs, stored: Stored, rounds_inputs: bool):
        self.folder, self.args, self.stored, self.rounds_inputs = folder, args, stored, rounds_inputs
        self.shapes = expected_shapes(args)
        self.scales = {rank: _read_scales(folder, args, rank) for rank in stored.shards}

    def matrix(self, name: str, ranges: list[range] | None, dtype: torch.dtype, to: Target) -> Tensor | QuantizedMatrix:
        """As `StoredMatrices.matrix`."""
        if not is_fp8(name, self.args):
            return self.stored.joined(name, ranges, dtype, to)
        if split_dim(name) == 0:
            blocks = [self._rows(name, rank, own, to) for rank, own in self._places(name, ranges)]
            if len(blocks) > 1 and torch.device(to.device).type != "cpu":  # a GPU has copies anyway
                q, scale = torch.cat([block.q for block in blocks]), torch.cat([block.scale for block in blocks])
                return Fp8Linear(q, scale, rounds_inputs=self.rounds_inputs)
            return blocks[0] if len(blocks) == 1 else RowBlocks(blocks)
        return self._columns(name, list(self._places(name, ranges)), to)

    def _places(self, name: str, ranges: list[range] | None) -> Iterator[tuple[int, range]]:
        """(shard, range within it) for ranges along the dimension that is split into shards."""
        dim = split_dim(name)
        assert dim is not None
        return places(ranges or [range(self.shapes[name][dim])], self._size(name))

    def _size(self, name: str) -> int:
        """The size of a shard's part along that dimension."""
        mapped = next(shard[name] for shard in self.stored.shards.values() if name in shard)
        return mapped.shape[split_dim(name) or 0]

    def _rows(self, name: str, rank: int, own: range, to: Target) -> Fp8Linear:
        q = self._part(name, rank, 0, own, to)
        return Fp8Linear(q, self._scale(name, rank)[own.start : own.stop].to(to.device), rounds_inputs=self.rounds_inputs)

    def _columns(self, name: str, own: list[tuple[int, range]], to: Target) -> Fp8Linear | ColumnBlocks:
        size, n_inputs = self._size(name), sum(len(within) for _, within in own)
        # The largest input of a whole shard sets the rounding steps, so a part of a shard needs all
        # of the shard's inputs.
        takes_whole_input = self.rounds_inputs and any(len(within) < size for _, within in own)
        blocks, inputs, start = [], [], 0
        for rank, within in own:
            q = self._part(name, rank, 1, within, to)
            columns, of_block = (within, size) if takes_whole_input else (None, None)
            scale = self._scale(name, rank).to(to.device)
            block = Fp8Linear(q, scale, rounds_inputs=self.rounds_inputs, columns=columns, n_inputs=of_block)
            blocks.append(block)
            inputs.append(range(rank * size, (rank + 1) * size) if takes_whole_input else range(start, start + len(within)))
            start += len(within)
        if len(blocks) == 1 and not takes_whole_input:
            return blocks[0]
        return ColumnBlocks(blocks, inputs, self.shapes[name][1] if takes_whole_input else n_inputs)

    def _part(self, name: str, rank: int, dim: int, own: range, to: Target) -> Tensor:
        mapped = self.stored.shards[rank][name]
        part = TensorSlice(mapped.narrow(dim, own.start, len(own)), mapped)
        return join([part], dim, torch.float8_e4m3fn, to)

    def _scale(self, name: str, rank: int) -> Tensor:
        """One scale per row of a shard's part: float32 (N,)."""
        return self.scales[rank][scale_key(name, rank)].flatten().clone()  # small; its file may change later


def _read_scales(folder: CheckpointFolder, args: ModelArgs, rank: int) -> Mapping[str, Tensor]:
    """The scales of one shard, checked. Raises CheckpointError."""
    path = folder.path / scales_name(rank)
    if not os.path.lexists(path):
        raise CheckpointError(f"{folder.path} lacks {with_hint(path)}, the scales of {folder.shards[rank].name}; fetch it")
    scales = read_shard(path)
    problems = wrong_scales(dtypes_and_shapes(scales), args, rank, len(folder.shards))
    check_problems(folder, [f"{path.name}: {problem}" for problem in problems])
    for key, values in scales.items():
        if wrong := odd(values, positive=True):
            raise CheckpointError(f"{path}: {key} holds {wrong}, expected positive numbers; fetch it again")
    return scales
