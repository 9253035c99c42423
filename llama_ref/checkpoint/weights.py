"""Shards on disk to a Transformer in memory, tensor by tensor.

Files are mapped, not read: where nothing has to change (CPU, the file's own dtype, one shard) a parameter is the file's
pages themselves; otherwise each tensor is cast and copied once, and its pages are let go before the next.
"""

import ctypes
import mmap
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.folder import CheckpointFolder
from llama_ref.checkpoint.inspect_pth import inspect_pth
from llama_ref.checkpoint.shapes import IGNORED, misfits, other_kind, strangers
from llama_ref.checkpoint.slices import Share, places, split_dim, wanted_ranges
from llama_ref.errors import CheckpointError
from llama_ref.model import Transformer

Progress = Callable[[int, int], None]  # bytes done, bytes in all

WHOLE = Share()
MOST_LISTED = 12  # wrong tensors named in one error


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

    Any number of shards is put together. Of several processes each holds its `share` of every matrix, and reads only that.
    Raises CheckpointError for a kind of release that is not read yet, for files that are not checkpoints, and for tensors that
    are missing, unexpected or misshapen: all of them in one message.
    """
    _refuse_other_kinds(folder, args)
    with torch.device("meta"):
        model = Transformer(args)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    _refuse_uneven(folder, expected)
    parts = {name: _parts(name, shape, args, share, len(folder.shards)) for name, shape in expected.items()}
    shards = {number: read_shard(folder.shards[number]) for number in _needed_shards(parts)}
    _check_tensors(folder, shards, expected)
    _refuse_different_copies(folder, shards)

    tied = _on_same_bytes(shards)
    names = [name for name in expected if not (tied and name == "output.weight")]
    done, total = 0, sum(_n_bytes(part, shards[part.shard][name]) for name in names for part in parts[name])
    for name in names:
        weight = _join(name, parts[name], shards, device, dtype)
        _set_weight(model, name, weight)
        done += sum(_n_bytes(part, shards[part.shard][name]) for part in parts[name])
        if progress:
            progress(done, total)
    if tied:
        model.output.weight = model.tok_embeddings.weight
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class _Part:
    """A piece of a tensor within one shard: `places` along `dim`, or all of it."""

    shard: int
    dim: int | None = None
    places: range | None = None

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self.dim is None else tensor.narrow(self.dim, self.places.start, len(self.places))


def _parts(name: str, shape: tuple[int, ...], args: ModelArgs, share: Share, n_shards: int) -> list[_Part]:
    """Where a share of one tensor lies. What every shard holds whole is read from a shard that is needed anyway."""
    dim = split_dim(name)
    if dim is None:
        return [_Part(share.rank * n_shards // share.world_size)]
    return [_Part(shard, dim, within) for shard, within in places(wanted_ranges(name, args, share), shape[dim] // n_shards)]


def _needed_shards(parts: dict[str, list[_Part]]) -> list[int]:
    return sorted({part.shard for of_tensor in parts.values() for part in of_tensor})


def _n_bytes(part: _Part, tensor: Tensor) -> int:
    return tensor.nbytes if part.dim is None else tensor.nbytes // tensor.shape[part.dim] * len(part.places)


def _set_weight(model: Transformer, name: str, weight: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(weight, requires_grad=False))


def is_tied(folder: CheckpointFolder) -> bool:
    """Whether a folder's output matrix is its embedding. Reads the shards' directories, no weights. Raises CheckpointError."""
    shards = {number: read_shard(path) for number, path in enumerate(folder.shards)}
    for path, shard in zip(folder.shards, shards.values(), strict=True):
        if "tok_embeddings.weight" not in shard:
            raise CheckpointError(f"{path} holds no tok_embeddings.weight; it is no shard of a Llama 3")
    return _on_same_bytes(shards)


def read_shard(path: Path) -> dict[str, Tensor]:
    """Map a .pth file: its tensors by name, none of their bytes read. Nothing in the file is executed.

    Raises CheckpointError for a file that is not an archive of tensors, is cut short or contradicts itself, or whose pickle
    asks for anything but tensors.
    """
    names = inspect_pth(path)  # vouches for every tensor's place, and that torch's own reader will meet nothing else
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as weights ({_first_line(error)}); fetch it again") from error
    return {name: tensors[name] for name in names if name not in IGNORED}


def _refuse_other_kinds(folder: CheckpointFolder, args: ModelArgs) -> None:
    kind = other_kind(args, folder.path)
    if kind:
        raise CheckpointError(f"{folder.path} is {kind}, which is not read yet; use the text release in bf16")


def _check_tensors(
    folder: CheckpointFolder, shards: dict[int, dict[str, Tensor]], expected: dict[str, tuple[int, ...]]
) -> None:
    described = {
        folder.shards[number].name: {
            name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in shard.items()
        }
        for number, shard in shards.items()
    }
    problems = []
    for file, wrong in misfits(described, expected, len(folder.shards)).items():
        problems += [f"{file}: {problem}" for problem in wrong]
        surplus = sorted(strangers(described[file], expected))
        problems += [f"{file}: {name} {described[file][name][1]} is unexpected" for name in surplus]
    if problems:
        more = f"\n  … and {len(problems) - MOST_LISTED} more" if len(problems) > MOST_LISTED else ""
        listed = "".join(f"\n  {problem}" for problem in problems[:MOST_LISTED])
        raise CheckpointError(f"{folder.path}: the weights do not fit {folder.params.name}:{listed}{more}")


def _refuse_different_copies(folder: CheckpointFolder, shards: dict[int, dict[str, Tensor]]) -> None:
    """Every shard holds the norms whole. Where two disagree, they are not of one model."""
    first, *others = shards
    for name in shards[first]:
        for other in others if split_dim(name) is None else ():
            one, another = shards[first][name], shards[other][name]
            if one.dtype == another.dtype and not torch.equal(one.view(torch.uint8), another.view(torch.uint8)):
                raise CheckpointError(
                    f"{folder.path}: {folder.shards[first].name} and {folder.shards[other].name} disagree about {name}, of "
                    "which each holds a copy: they belong to different models; fetch the folder's files from one release"
                )


def _refuse_uneven(folder: CheckpointFolder, expected: dict[str, tuple[int, ...]]) -> None:
    n_shards = len(folder.shards)
    for name, shape in expected.items():
        dim = split_dim(name)
        if dim is not None and shape[dim] % n_shards:
            raise CheckpointError(
                f"{folder.path}: {n_shards} shards cannot hold equal parts of {name} {shape}, as {folder.params.name} has it; "
                "do all of them belong to this model?"
            )


def _on_same_bytes(shards: dict[int, dict[str, Tensor]]) -> bool:
    """Whether output and embedding are one matrix: no output in the files, or both names on the same bytes."""
    return all(
        "output.weight" not in shard or shard["output.weight"].data_ptr() == shard["tok_embeddings.weight"].data_ptr()
        for shard in shards.values()
    )


def _join(
    name: str, parts: list[_Part], shards: dict[int, dict[str, Tensor]], device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """A tensor's parts as one, in `dtype` on `device`; the mapped pages themselves where they will do."""
    mapped = [part.of(shards[part.shard][name]) for part in parts]
    if len(mapped) == 1 and mapped[0].is_contiguous():
        whole = mapped[0].to(device=device, dtype=dtype)
        if whole.data_ptr() != mapped[0].data_ptr():
            release_pages(shards[parts[0].shard][name])
        return whole
    dim = parts[0].dim or 0
    shape = list(mapped[0].shape)
    shape[dim] = sum(part.shape[dim] for part in mapped)
    whole = torch.empty(shape, dtype=dtype, device=device)
    sizes = [part.shape[dim] for part in mapped]
    for part, source, target in zip(parts, mapped, whole.split(sizes, dim), strict=True):
        target.copy_(source)
        release_pages(shards[part.shard][name])
    return whole


def release_pages(tensor: Tensor) -> None:
    """Let go of a mapped tensor's pages, which otherwise count as this process's memory until the file is unmapped."""
    if not sys.platform.startswith("linux") or not tensor.is_contiguous():  # strides may make a tensor larger than its bytes
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start  # only pages that hold nothing else
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
