"""Advice for weight files with unusual names, such as trainers write: rename or convert them."""

import re
from collections.abc import Sequence
from pathlib import Path

from llama_ref.errors import CheckpointError

NUMBERED = re.compile(r".*?(\d+)-of-(\d+)\.safetensors")
NOT_WEIGHTS = re.compile(r"(?i)\.|adapter|fp8_scales|.*(optim|scheduler|rng_state|scaler|recipe_state|training_args)")


def how_to_rename(path: Path, names: Sequence[str]) -> str | None:
    """Advice for a folder whose weights have an unusual name or format; else None."""
    files = [name for name in names if name.endswith((".pt", ".pth", ".safetensors")) and not NOT_WEIGHTS.match(name)]
    safetensors = [name for name in files if name.endswith(".safetensors")]
    if safetensors:
        return _of_safetensors(path, safetensors, names)
    return _of_pickles(path, files, names) if files else None


def _of_safetensors(path: Path, files: list[str], names: Sequence[str]) -> str | None:
    from llama_ref.checkpoint.advice.foreign_names import has_hf_names, has_meta_names

    tensors = [tensor for name in files for tensor in _tensor_names(path / name)]
    if has_meta_names(tensors):
        return (
            f"{path} holds Meta's tensors as safetensors ({files[0]}): convert them with "
            f"`torch.save(safetensors.torch.load_file({files[0]!r}), 'consolidated.00.pth')`{_and_fetch('params.json', names)}"
        )
    if has_hf_names(tensors):
        renamed = f"rename {files[0]} to {_hf_name(files[0], 1, len(files))}{', and so on' if len(files) > 1 else ''}"
        return f"{path} holds its weights under another name: {renamed}{_and_fetch('config.json', names)}"
    return None


def _of_pickles(path: Path, files: list[str], names: Sequence[str]) -> str | None:
    from llama_ref.checkpoint.advice.foreign_names import has_hf_names, has_meta_names

    tensors = _tensor_names(path / files[0])
    if has_meta_names(tensors):
        which = files[0] if len(files) == 1 else f"one of {', '.join(files[:4])}"
        renamed = f"rename {which} to consolidated.00.pth"
        return f"{path} holds its weights under another name: {renamed}{_and_fetch('params.json', names)}"
    if has_hf_names(tensors):
        return (
            f"{path} holds Hugging Face's tensors as a pickle ({files[0]}): convert them with "
            f"`safetensors.torch.save_file(torch.load({files[0]!r}), 'model.safetensors')`{_and_fetch('config.json', names)}"
        )
    return None


def _hf_name(name: str, number: int, total: int) -> str:
    """The name that Hugging Face's library gives a file; numbers in its old name are kept."""
    if match := NUMBERED.fullmatch(name):
        number, total = int(match[1]), int(match[2])
    elif total == 1:
        return "model.safetensors"
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def _and_fetch(params: str, names: Sequence[str]) -> str:
    return "" if params in names else f", and put the model's {params} beside it"


def _tensor_names(path: Path) -> list[str]:
    """The names of a file's tensors; none if it cannot be read."""
    from llama_ref.checkpoint.formats.pth import inspect_pth
    from llama_ref.checkpoint.formats.safetensors import inspect_safetensors

    try:
        return list(inspect_safetensors(path) if path.suffix == ".safetensors" else inspect_pth(path))
    except CheckpointError:
        return []
