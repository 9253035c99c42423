"""The matrices of a folder that bitsandbytes wrote, for the loader (bitsandbytes.py)."""

import torch
from torch import Tensor

from llama_ref.checkpoint.folder import CheckpointFolder
from llama_ref.checkpoint.hf.names import from_hf_rope
from llama_ref.checkpoint.loading.to_device import Target
from llama_ref.checkpoint.meta_quantized.odd_numbers import odd
from llama_ref.checkpoint.reader import Stored
from llama_ref.errors import CheckpointError
from llama_ref.parallel.sharding import split_dim
from llama_ref.quantization.linear import Int8Linear, QuantizedMatrix

LARGEST = 127.0
ROW_MAJOR = 0  # the only weight_format that bitsandbytes still writes


class StoredInt8:
    """An int8 folder's matrices: weights only, the inputs are not rounded."""

    def __init__(self, folder: CheckpointFolder, stored: Stored):
        self.folder, self.stored, self.tied = folder, stored, stored.tied
        self.parts = stored.shards[0]

    def matrix(self, name: str, ranges: list[range] | None, dtype: torch.dtype, to: Target) -> Tensor | QuantizedMatrix:
        """As `StoredMatrices.matrix`. Raises CheckpointError for another layout of rows and for wrong scales."""
        stem = name.removesuffix(".weight")
        largest = self.parts.get(f"{stem}.SCB")
        if largest is None:
            return self.stored.joined(name, ranges, dtype, to)
        largest = largest.flatten()
        self._check(stem, largest)
        if self.stored.hf_args:
            largest = from_hf_rope(name, largest[:, None], self.stored.hf_args.head_dim)[:, 0]
        if ranges is not None and split_dim(name) == 0:
            largest = torch.cat([largest[each.start : each.stop] for each in ranges])
        scale = (largest / LARGEST).to(to.device)
        return Int8Linear(self.stored.joined(name, ranges, torch.int8, to), scale)

    def _check(self, stem: str, largest: Tensor) -> None:
        layout = self.parts.get(f"{stem}.weight_format")
        if layout is not None and int(layout) != ROW_MAJOR:
            raise CheckpointError(
                f"{self.folder.path}: {stem}.weight has bitsandbytes' weight_format {int(layout)}, made for one kind of card; "
                "only 0 (row major) is read: fetch the release itself"
            )
        if wrong := odd(largest):
            raise CheckpointError(
                f"{self.folder.path}: {stem}.SCB holds {wrong}, expected finite positive numbers; fetch it again"
            )
