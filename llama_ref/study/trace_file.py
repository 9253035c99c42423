"""Save a trace as a safetensors file, which other programs can open.

Its tensors are the activations by name, `tokens` and `positions`. Its metadata contain `model_args`:
the params.json of the traced model.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from llama_ref.args import ModelArgs, ffn_dim
from llama_ref.checkpoint.formats.safetensors import REFETCH, map_safetensors, read_metadata
from llama_ref.checkpoint.formats.safetensors_writer import safetensors_pieces
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.study.names import all_names, axes
from llama_ref.study.report.output import write_output

ARGS = "model_args"
IDS = ("tokens", "positions")


def write_trace(
    path: str | Path, values: Mapping[str, Tensor], tokens: Tensor, positions: Tensor, model_args: ModelArgs
) -> None:
    """Write or replace the file, atomically. Raises RequestError if it cannot be written."""
    tensors = {"tokens": tokens, "positions": positions, **values}
    pieces = safetensors_pieces(tensors, {ARGS: json.dumps(_params(model_args))})
    write_output(_target(path), pieces)


def read_trace(path: str | Path) -> tuple[dict[str, Tensor], Tensor, Tensor, ModelArgs]:
    """A file's activations, tokens, positions and model_args. Raises CheckpointError."""
    path = _target(path)
    try:
        metadata, tensors = read_metadata(path), map_safetensors(path)
    except CheckpointError as error:
        raise CheckpointError(str(error).removesuffix(REFETCH)) from error
    if ARGS not in metadata or not tensors.keys() >= set(IDS):
        raise CheckpointError(f"{path} is not a trace, expected a file that Trace.save wrote")
    try:
        args = ModelArgs.from_dict(json.loads(metadata[ARGS]))
    except (CheckpointError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its {ARGS} are damaged: {error}") from error
    tokens, positions = (tensors.pop(name) for name in IDS)
    known = set(all_names(args))
    for name, value in tensors.items():
        if name not in known or len(axes(name)) != value.dim():
            raise CheckpointError(f"{path} holds {name:.80} {tuple(value.shape)}, which is not an activation of its model")
    if tokens.dim() != 2 or positions.shape != tokens.shape:
        raise CheckpointError(
            f"{path} holds tokens {tuple(tokens.shape)} and positions {tuple(positions.shape)}, expected two (B, T)"
        )
    return tensors, tokens, positions, args


def _target(path: str | Path) -> Path:
    """The path with ~ and links resolved."""
    try:
        return Path(os.path.realpath(Path(path).expanduser()))
    except (TypeError, ValueError, RuntimeError) as error:  # ValueError: a NUL byte; RuntimeError: an unknown home directory
        raise RequestError(f"path is {path!r:.200}, expected a file such as 'trace.safetensors' ({error})") from error


def _params(args: ModelArgs) -> dict[str, object]:
    """A dictionary from which `ModelArgs.from_dict` reads equal args."""
    params = {key: value for key, value in asdict(args).items() if value is not None and key != "extra"}
    if args.hidden_dim not in (None, ffn_dim(args.dim, args.multiple_of, args.ffn_dim_multiplier)):
        del params["multiple_of"]  # an explicit width, which the formula does not give
    return params | dict(args.extra)
