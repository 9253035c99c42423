"""The tensors of a quantized release, dequantized when they are requested."""

import torch

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.folder import CheckpointFolder
from llama_ref.checkpoint.loading.to_device import Target
from llama_ref.checkpoint.meta_quantized.kinds import Kind
from llama_ref.checkpoint.meta_quantized.matrices import matrices_of
from llama_ref.checkpoint.reader import Stored, TensorSlice, open_stored
from llama_ref.checkpoint.shapes import OUTPUT, WEIGHT_DTYPES, expected_shapes
from llama_ref.formatting import dtype_name
from llama_ref.quantization.linear import QuantizedMatrix

NOWHERE = torch.empty(0, device="cpu")  # the `mapped` tensor of slices that are in memory


def open_weights(folder: CheckpointFolder, args: ModelArgs) -> "Stored | Dequantized":
    """Map a folder's files as `open_stored` does; a quantized release's matrices are dequantized."""
    stored = open_stored(folder, args)
    return stored if stored.kind is Kind.PLAIN else Dequantized(folder, args, stored)


class Dequantized:
    """Replaces a quantized release's `Stored` when it is converted or compared.

    Its matrices are float32. A rotation and low-rank adaptors are merged into the weights: with
    these weights alone, a model computes the same as the release without rounding of inputs.
    """

    def __init__(self, folder: CheckpointFolder, args: ModelArgs, stored: Stored):
        self.stored, self.kind = stored, stored.kind
        self.matrices = matrices_of(folder, args, stored, "full")
        self.tied = self.matrices.tied
        self.shapes = expected_shapes(args)

    def names(self) -> list[str]:
        """The names of all tensors."""
        return [name for name in self.shapes if not (self.tied and name == OUTPUT)]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype to store a tensor in: bfloat16 for matrices that are quantized."""
        return torch.bfloat16 if self._is_quantized(name) else self.stored.dtype(name)

    def parts(self, name: str) -> list[TensorSlice]:
        """The whole tensor, in one part; none if there is no such tensor."""
        return self.slices(name) if name in self.names() else []

    def slices(self, name: str, ranges: list[range] | None = None) -> list[TensorSlice]:
        """The `ranges` of a tensor along `split_dim(name)` (None: all)."""
        if not self._is_quantized(name):
            return self.stored.slices(name, ranges)
        matrix = self._matrix(name, ranges)
        if not matrix.takes_whole_input:
            return [TensorSlice(matrix.dequantize(), NOWHERE)]
        whole = self._matrix(name, None).dequantize()  # after a rotation, each column depends on all columns
        return [TensorSlice(whole[:, each.start : each.stop], NOWHERE) for each in ranges or [range(whole.shape[1])]]

    def _is_quantized(self, name: str) -> bool:
        return dtype_name(self.stored.dtype(name)) not in WEIGHT_DTYPES

    def _matrix(self, name: str, ranges: list[range] | None) -> QuantizedMatrix:
        matrix = self.matrices.matrix(name, ranges, torch.float32, Target("cpu"))
        assert isinstance(matrix, QuantizedMatrix)
        return matrix
