"""The tensors in Hugging Face's files: their names, and their layout where it differs from Meta's.

Matrices that RoPE rotates have another order of rows. In vision models the embedding also holds the
rows of `learnable_embedding`, the patch matrix is a convolution kernel, and tables of tile
positions repeat their vectors (vision/tile_tables.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llama_ref.args import N_LEARNABLE, PATCH_SIZE, ModelArgs
from llama_ref.checkpoint.hf.bitsandbytes import name_in_files
from llama_ref.checkpoint.hf.names import from_hf_rope, hf_name, is_rotated, to_hf_rope
from llama_ref.checkpoint.hf.vision.tile_tables import from_grid_rows, table_shape, to_grid_rows
from llama_ref.checkpoint.meta_quantized.kinds import Kind, tensors_of
from llama_ref.checkpoint.shapes import EMBEDDING, LEARNABLE, Expected, Shape, expected_shapes

if TYPE_CHECKING:  # `verify` reads names and shapes, and does not wait for torch
    from torch import Tensor

    from llama_ref.checkpoint.formats.lazy_tensor import LazyTensor

PATCHES = "vision_model.vision_encoder.conv1._linear.weight"
CHANNELS = 3


def tensors_in_files(args: ModelArgs, kind: Kind = Kind.PLAIN) -> dict[str, Expected]:
    """The tensors of a folder, by the names in its files."""
    tensors = tensors_of(args, kind)
    if not args.has_vision:
        return {name_in_files(name): tensor for name, tensor in tensors.items()}
    return {
        hf_name(name, args): tensor._replace(shape=_shape_in_files(name, tensor.shape), may_be_tied=False)
        for name, tensor in tensors.items()
        if name != LEARNABLE
    }


def under_metas_names(stored: "Mapping[str, Tensor]", args: ModelArgs, kind: Kind) -> "dict[str, Tensor]":
    """A folder's tensors under Meta's names, still in the files' layout; unknown names are kept."""
    if not args.has_vision:
        ours = {name_in_files(name): name for name in tensors_of(args, kind)}
        return {ours.get(name, name): tensor for name, tensor in stored.items()}
    ours = {hf_name(name, args): name for name in tensors_of(args, kind) if name != LEARNABLE}
    tensors = {ours.get(name, name): tensor for name, tensor in stored.items()}
    if EMBEDDING in tensors:
        tensors[EMBEDDING], tensors[LEARNABLE] = tensors[EMBEDDING].tensor_split([args.vocab_size])
    return tensors


def from_hf(name: str, stored: "Tensor", args: ModelArgs) -> "Tensor":
    """A tensor, or some of its heads, in Meta's layout.

    The result is a view, or a copy if order or size differ. Raises CheckpointError as
    `from_grid_rows` does.
    """
    if is_rotated(name):
        is_whole = stored.dim() == 2 and len(stored) % args.head_dim == 0  # else there are no heads to reorder
        return from_hf_rope(name, stored, args.head_dim) if is_whole else stored
    if name == PATCHES:
        return stored.flatten(1)
    if is_tile_table(name):
        return from_grid_rows(hf_name(name, args), stored, expected_shapes(args)[name])
    return stored


def to_hf(tensors: "Sequence[LazyTensor]", args: ModelArgs) -> "list[LazyTensor]":
    """A model's whole tensors with Hugging Face's names and layout, for writing."""
    learnable = next((tensor for tensor in tensors if tensor.name == LEARNABLE), None)
    return [_to_hf(tensor, learnable, args) for tensor in tensors if tensor is not learnable]


def _to_hf(tensor: "LazyTensor", learnable: "LazyTensor | None", args: ModelArgs) -> "LazyTensor":
    name = tensor.name

    def blocks() -> "Iterator[Tensor]":
        if is_tile_table(name):
            import torch

            yield from to_grid_rows(torch.cat(list(tensor.blocks())))
            return
        for rows in tensor.blocks():
            yield to_hf_rope(name, rows, args.head_dim).reshape(-1, *shape[1:])
        if name == EMBEDDING and learnable is not None:
            for rows in learnable.blocks():
                yield rows.to(tensor.dtype)

    shape = _shape_in_files(name, tensor.shape) if args.has_vision else tensor.shape
    return replace(tensor, name=hf_name(name, args), shape=shape, blocks=blocks)


def _shape_in_files(name: str, shape: Shape) -> Shape:
    """The shape in a vision model's files."""
    if name == EMBEDDING:
        return shape[0] + N_LEARNABLE, shape[1]
    if name == PATCHES:
        return shape[0], CHANNELS, PATCH_SIZE, PATCH_SIZE
    return table_shape(shape) if is_tile_table(name) else shape


def is_tile_table(name: str) -> bool:
    """Whether a tensor holds a vector for each place in a grid of tiles."""
    return name.endswith(("pos_embed.embedding", ".gated_positional_embedding"))
