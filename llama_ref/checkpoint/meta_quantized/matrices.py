"""One interface for the loader to the matrices of all quantized releases."""

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.folder import CheckpointFolder
from llama_ref.checkpoint.hf.int8_matrices import StoredInt8
from llama_ref.checkpoint.loading.to_device import Target
from llama_ref.checkpoint.meta_quantized.fp8 import StoredFp8
from llama_ref.checkpoint.meta_quantized.int4 import StoredInt4
from llama_ref.checkpoint.meta_quantized.kinds import ROUNDED, Kind
from llama_ref.checkpoint.reader import Stored
from llama_ref.errors import RequestError
from llama_ref.quantization.linear import QuantizedMatrix

Activations = Literal["reference", "full"]  # the inputs of quantized matrices: rounded as Meta's code does, or not


class StoredMatrices(Protocol):
    """A folder whose matrices are quantized. `tied`: one matrix is both embedding and output."""

    tied: bool

    def matrix(self, name: str, ranges: list[range] | None, dtype: torch.dtype, to: Target) -> Tensor | QuantizedMatrix:
        """The `ranges` of a matrix as a module, or of an unquantized tensor as a tensor in `dtype`."""
        ...


def matrices_of(folder: CheckpointFolder, args: ModelArgs, stored: Stored, activations: Activations | None) -> StoredMatrices:
    """The matrices of a quantized release's mapped files. Raises CheckpointError for wrong scales."""
    rounds_inputs = activations != "full"
    if stored.kind is Kind.INT8:
        return StoredInt8(folder, stored)
    if stored.kind is Kind.INT4:
        return StoredInt4(folder, args, stored, rounds_inputs)
    return StoredFp8(folder, args, stored, rounds_inputs)


def check_activations(folder: CheckpointFolder, activations: Activations | None, kind: Kind) -> None:
    """Raise RequestError for an unknown value, or if the option does not apply to the folder."""
    if activations is None:
        return
    if activations not in get_args(Activations):
        raise RequestError(f"activations is {activations!r:.60}, expected {' or '.join(get_args(Activations))}")
    if kind not in ROUNDED:
        raise RequestError(f"activations is for Meta's int4 and fp8 releases, and {folder.path} is not one: leave it out")
