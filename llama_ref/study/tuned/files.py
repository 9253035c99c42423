"""The published format of a tuned lens: a folder with config.json and params.pt.

params.pt holds `{layer}.weight` (D, D) and `{layer}.bias` (D,). It is a pickle, which our own reader reads
as data without executing it; torch.load is never used.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_ref.checkpoint.formats.atomic import new_folder
from llama_ref.checkpoint.formats.lazy_tensor import LazyTensor
from llama_ref.checkpoint.formats.pth_writer import write_pth
from llama_ref.checkpoint.reader import read_shard
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.files import BadValue, json_object

CONFIG, PARAMS = "config.json", "params.pt"
LENS_TYPE = "linear_tuned_lens"
LIMIT_BYTES = 1 << 20
KEYS = "d_model and num_hidden_layers"


@dataclass(frozen=True)
class Stored:
    """The contents of a folder; tensors are memory-mapped, (D, D) and (D,) for each layer."""

    weights: list[Tensor]
    biases: list[Tensor]
    base_model: str
    unembed_hash: str | None


def read_folder(path: str | Path) -> Stored:
    """Read a folder. Raises CheckpointError for one that is damaged, or not a tuned lens."""
    try:
        folder = Path(path).expanduser()
    except (TypeError, RuntimeError) as error:  # RuntimeError: an unknown home directory
        raise RequestError(f"a tuned lens is {path!r:.80}, expected a folder: {error}") from error
    with json_object(folder / CONFIG, "the config of a tuned lens", KEYS, LIMIT_BYTES) as config:
        dim, n_layers = _count(config, "d_model"), _count(config, "num_hidden_layers")
        has_bias, kind = config.get("bias", True), config.get("lens_type", LENS_TYPE)
        if kind != LENS_TYPE:
            raise BadValue(f"lens_type is {kind!r:.60}, expected {LENS_TYPE}")
        if not isinstance(has_bias, bool):
            raise BadValue(f"bias is {has_bias!r:.40}, expected true or false")
        base_model = _text(config, "base_model_name_or_path") or ""
        unembed_hash = _text(config, "unembed_hash")
    file = folder / PARAMS
    held = read_shard(file)
    shapes: dict[str, tuple[int, ...]] = {f"{layer}.weight": (dim, dim) for layer in range(n_layers)}
    shapes |= {f"{layer}.bias": (dim,) for layer in range(n_layers)} if has_bias else {}
    _check(file, held, shapes)
    weights = [held[f"{layer}.weight"] for layer in range(n_layers)]
    biases = [held[f"{layer}.bias"] if has_bias else torch.zeros(dim, device="cpu") for layer in range(n_layers)]
    return Stored(weights, biases, base_model, unembed_hash)


def check_target(path: str | Path) -> Path:
    """The folder to which a lens can be written. Raises RequestError if it is not empty."""
    try:
        folder = Path(path).expanduser()
        entries = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"cannot use {path!r:.200} as a folder: {reason}") from error
    if entries:
        raise RequestError(f"{folder} already holds {', '.join(entries[:4])}: choose another folder for the lens")
    return folder


def write_folder(path: str | Path, lens: Stored) -> None:
    """Write a new folder atomically. Raises RequestError and CheckpointError."""
    folder = check_target(path)
    config = {
        "base_model_name_or_path": lens.base_model,
        "d_model": len(lens.biases[0]),
        "num_hidden_layers": len(lens.weights),
        "bias": True,
        "base_model_revision": None,
        "unembed_hash": lens.unembed_hash,
        "lens_type": LENS_TYPE,
    }
    pairs: Sequence[tuple[Tensor, Tensor]] = list(zip(lens.weights, lens.biases, strict=True))
    tensors = [
        LazyTensor.from_tensor(f"{layer}.{part}", tensor.contiguous())
        for layer, pair in enumerate(pairs)
        for part, tensor in zip(("weight", "bias"), pair, strict=True)
    ]
    with new_folder(folder, n_bytes=sum(tensor.nbytes for tensor in tensors)) as new:
        write_pth(new / PARAMS, tensors)
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ---- checks


def _count(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 20:
        raise BadValue(f"{key} is {value!r:.40}, expected a whole number from 1: is it the config of a tuned lens?")
    return value


def _text(config: dict[str, Any], key: str) -> str | None:
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise BadValue(f"{key} is {value!r:.40}, expected a text or null")
    return value


def _check(file: Path, held: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless the file has these tensors, of finite floating-point numbers."""
    for name in sorted(held.keys() ^ shapes.keys()):
        expected = "which does not fit config.json" if name in held else "which config.json requires"
        where = "has" if name in held else "lacks"
        raise CheckpointError(f"{file} {where} {name!r:.60}, {expected}: does it belong to another lens?")
    for name, tensor in held.items():
        if tuple(tensor.shape) != shapes[name] or not tensor.is_floating_point():
            raise CheckpointError(
                f"{file}: {name} is {tuple(tensor.shape)} of {tensor.dtype}, expected floating-point numbers {shapes[name]}"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"{file}: {name} has values that are not finite: fetch it again")
