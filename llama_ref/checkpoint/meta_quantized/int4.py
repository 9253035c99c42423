"""Make a model's matrices from Meta's int4 releases (Llama 3.2 1B and 3B, SpinQuant and QLoRA).

The files hold one four-bit number per byte; in memory two are packed into a byte. Embedding and
output have eight bits and stay memory-mapped.
"""

from dataclasses import replace

import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.folder import CheckpointFolder
from llama_ref.checkpoint.loading.to_device import Target
from llama_ref.checkpoint.meta_quantized.kinds import Int4Params
from llama_ref.checkpoint.meta_quantized.odd_numbers import odd
from llama_ref.checkpoint.reader import Stored, tables_are_equal
from llama_ref.checkpoint.shapes import EMBEDDING, OUTPUT, expected_shapes
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.machine import memory
from llama_ref.parallel.sharding import split_dim
from llama_ref.quantization.linear import Int4Linear, Int8Embedding, Int8Linear, QuantizedMatrix
from llama_ref.quantization.meta_int4 import LowRank, MetaInt4Linear
from llama_ref.quantization.rounding import pack

PACKED_WEIGHTS = 1 << 20  # at a time: few enough to stay in a processor's cache


class StoredInt4:
    """An int4 release's matrices; `rounds_inputs`: round as Meta's reference does (meta_int4.py).

    `tied`: output and embedding are equal in the files, and one matrix serves for both.
    """

    def __init__(self, folder: CheckpointFolder, args: ModelArgs, stored: Stored, rounds_inputs: bool):
        self.folder, self.stored, self.rounds_inputs = folder, stored, rounds_inputs
        self.params = Int4Params.from_args(args)
        self.shapes = expected_shapes(args)
        self.names = set(stored.names())
        self.tied = tables_are_equal(stored.shards.values())

    def matrix(self, name: str, ranges: list[range] | None, dtype: torch.dtype, to: Target) -> Tensor | QuantizedMatrix:
        """As `StoredMatrices.matrix`. Raises CheckpointError for values out of range."""
        if split_dim(name) is None:
            return self.stored.joined(name, ranges, dtype, to)
        stem = name.removesuffix(".weight")
        if name in (EMBEDDING, OUTPUT):
            q = self.stored.joined(name, ranges, torch.int8, to)
            scale = self._scales(f"{stem}.scales", ranges, to).flatten()
            return Int8Embedding(q, scale, dtype) if name == EMBEDDING else Int8Linear(q, scale)
        own, n_inputs = ranges if split_dim(name) == 1 else None, self.shapes[name][1]
        rotates = self.params.rotates and stem.endswith("w2")
        takes_whole_input = own is not None and len(own[0]) < n_inputs and (self.rounds_inputs or rotates)
        return MetaInt4Linear(
            self._matrix(name, ranges, to),
            rounds_inputs=self.rounds_inputs,
            rotates_inputs=rotates,
            adaptor=self._adaptor(stem, ranges, dtype, to) if self.params.rank else None,
            columns=own[0] if own and takes_whole_input else None,
            n_inputs=n_inputs if takes_whole_input else None,
        )

    def _matrix(self, name: str, ranges: list[range] | None, to: Target) -> Int4Linear:
        stem = name.removesuffix(".weight")
        of_groups = self._groups(name, ranges) if split_dim(name) == 1 else ranges
        scale, zero = self._scales(f"{stem}.scales", of_groups, to), None
        if f"{stem}.zeros" in self.names:
            zero = -scale * self._scales(f"{stem}.zeros", of_groups, to)
        q = self.stored.joined(name, ranges, torch.int8, replace(to, in_memory=False))
        packed = memory.empty(q.shape[0], q.shape[1] // 2, dtype=torch.uint8, device=q.device)
        step = max(1, PACKED_WEIGHTS // q.shape[1])
        for rows, target in zip(q.split(step), packed.split(step), strict=True):
            numbers = (rows + 8).view(torch.uint8)  # 0..15
            if (numbers > 15).any():
                raise CheckpointError(
                    f"{self.folder.path}: {name} holds numbers from {rows.min()} to {rows.max()}, expected four bits, -8 to 7"
                )
            target.copy_(pack(numbers.unflatten(1, (-1, self.params.group))))
        for part in self.stored.parts(name):
            part.release()
        return Int4Linear(packed, scale, zero)

    def _scales(self, name: str, ranges: list[range] | None, to: Target) -> Tensor:
        # Copied, so that the files' pages can be released when a kernel repacks the scales.
        scales = self.stored.joined(name, ranges, torch.float32, replace(to, in_memory=True))
        if wrong := odd(scales.abs() if name.endswith(".zeros") else scales):
            raise CheckpointError(f"{self.folder.path}: {name} holds {wrong}, expected finite positive numbers; fetch it again")
        return scales

    def _adaptor(self, stem: str, ranges: list[range] | None, dtype: torch.dtype, to: Target) -> LowRank:
        names = f"{stem}.adaptor.A.weight", f"{stem}.adaptor.B.weight"
        a, b = (self.stored.joined(name, None if split_dim(name) is None else ranges, dtype, to) for name in names)
        return LowRank(a, b, self.params.low_rank_scale)

    def _groups(self, name: str, ranges: list[range] | None) -> list[range] | None:
        """Ranges of columns as ranges of groups. Raises RequestError for ranges that split one."""
        group = self.params.group
        for each in ranges or ():
            if each.start % group or each.stop % group:
                raise RequestError(
                    f"{name} of {self.folder.path} has groups of {group} weights, which this number of processes "
                    f"would split (columns {each.start:,} to {each.stop:,}): start another number of processes"
                )
        return None if ranges is None else [range(each.start // group, each.stop // group) for each in ranges]
