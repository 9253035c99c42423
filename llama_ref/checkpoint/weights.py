"""Weights on disk to a Transformer in memory, tensor by tensor.

Files are mapped, not read: where nothing has to change (CPU, the file's own dtype, one piece) a parameter is the file's
pages themselves; otherwise each tensor is cast and copied once, and its pages are let go before the next.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.folder import CheckpointFolder
from llama_ref.checkpoint.shapes import expected_shapes
from llama_ref.checkpoint.slices import WHOLE, Share, part_shape, split_dim, wanted_ranges
from llama_ref.checkpoint.stored import EMBEDDING, OUTPUT, Piece, open_stored
from llama_ref.model import Transformer

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def load_model(
    folder: CheckpointFolder,
    args: ModelArgs,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    share: Share = WHOLE,
    progress: Progress | None = None,
) -> Transformer:
    """Build the model of a folder, in `dtype` on `device`, frozen and in evaluation mode.

    Any number of files is put together. Of several processes each holds its `share` of every matrix and its stage's layers, and
    reads only those; what lives in other stages stays on the meta device. Raises CheckpointError as `open_stored` does.
    """
    layers = share.layers(args.n_layers)
    with torch.device("meta"):
        model = Transformer(replace(args, n_layers=len(layers)))
    shapes = {name: shape for name, shape in expected_shapes(args).items() if _lives_here(name, share, layers)}
    wanted = {name: wanted_ranges(name, args, share) for name in shapes}
    stored = open_stored(folder, args, wanted)
    is_one_matrix = stored.tied and {EMBEDDING, OUTPUT} <= wanted.keys()
    if is_one_matrix:
        del wanted[OUTPUT]
    done = 0
    total = sum(math.prod(part_shape(name, shapes[name], ranges)) for name, ranges in wanted.items()) * dtype.itemsize
    for name, ranges in wanted.items():
        weight = _join(stored.pieces(name, ranges), split_dim(name), device, dtype)
        _set_weight(model, _name_here(name, layers), weight)
        done += weight.nbytes
        if progress:
            progress(done, total)
    if is_one_matrix:
        model.output.weight = model.tok_embeddings.weight
    return model.eval().requires_grad_(False)


def _lives_here(name: str, share: Share, layers: range) -> bool:
    """Whether a share's stage needs the tensor; a tied output is needed under its own name."""
    if name.startswith("layers."):
        return _layer(name) in layers
    return share.is_first_stage if name == EMBEDDING else share.is_last_stage


def _name_here(name: str, layers: range) -> str:
    """Layers count from 0 in every stage's model."""
    if not name.startswith("layers."):
        return name
    layer = _layer(name)
    return name.replace(f"layers.{layer}.", f"layers.{layer - layers.start}.", 1)


def _layer(name: str) -> int:
    return int(name.split(".")[1])


def _set_weight(model: Transformer, name: str, weight: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(weight, requires_grad=False))


def _join(pieces: list[Piece], dim: int | None, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """A tensor's pieces as one, in `dtype` on `device`; the mapped pages themselves where they will do."""
    first = pieces[0].tensor
    if len(pieces) == 1 and first.is_contiguous() and first.dtype == dtype and first.device == torch.device(device):
        if not pieces[0].is_mapped:
            pieces[0].release()
        return first
    dim = dim or 0
    sizes = [piece.tensor.shape[dim] for piece in pieces]
    shape = list(first.shape)
    shape[dim] = sum(sizes)
    whole = torch.empty(shape, dtype=dtype, device=device)
    for piece, target in zip(pieces, whole.split(sizes, dim), strict=True):
        piece.copy_to(target)
    return whole
