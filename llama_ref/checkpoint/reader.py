"""Read a folder's weights from either format, under Meta's names and in Meta's layout.

Files are mapped, not read. Callers get memory-mapped slices and release their pages when done.
"""

import ctypes
import logging
import mmap
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.advice.foreign_names import foreign_names
from llama_ref.checkpoint.advice.missing_file import with_hint
from llama_ref.checkpoint.folder import CheckpointFolder, shard_name
from llama_ref.checkpoint.formats.pth import TensorInfo, inspect_open_pth
from llama_ref.checkpoint.formats.safetensors import inspect_safetensors, map_safetensors
from llama_ref.checkpoint.hf.bitsandbytes import is_int8
from llama_ref.checkpoint.hf.layout import from_hf, tensors_in_files, under_metas_names
from llama_ref.checkpoint.hf.names import OTHER_TEXT_MODEL, hf_name, usual_name
from llama_ref.checkpoint.loading.to_device import PinnedCopier, Target
from llama_ref.checkpoint.mapped_file import map_file
from llama_ref.checkpoint.meta_quantized.kinds import Kind, contradiction, kind_of, tensors_of
from llama_ref.checkpoint.shapes import (
    EMBEDDING,
    OUTPUT,
    DtypeAndShape,
    Expected,
    dtypes_and_shapes,
    expected_shapes,
    implied_shards,
    is_ignored,
    misfits,
    own_names,
    strangers,
)
from llama_ref.errors import CheckpointError
from llama_ref.files import opened
from llama_ref.formatting import comma_list, printable
from llama_ref.parallel.sharding import places, split_dim

logger = logging.getLogger(__name__)

COPIED_BYTES = 4 << 20  # at a time
MOST_LISTED = 12  # wrong tensors named in one error

Wanted = Mapping[str, list[range] | None]  # ranges along `split_dim(name)` by name; None: all


@dataclass(frozen=True)
class TensorSlice:
    """A part of a tensor, as a view or a copy of the `mapped` tensor of one file."""

    tensor: Tensor
    mapped: Tensor

    @property
    def is_mapped(self) -> bool:
        """Whether the slice is a view of the mapped file, not a copy."""
        return 0 <= self.tensor.data_ptr() - self.mapped.data_ptr() < max(1, self.mapped.nbytes)

    def copy_to(self, target: Tensor, copier: PinnedCopier | None = None) -> None:
        """Copy to `target` some rows at a time, and release their pages before the next rows.

        With a `copier`, `target` is on its device, which may still be copying on return.
        """
        if copier:
            copier.copy(self.tensor, target, release_rows if self.is_mapped else None)
            self.release()
            return
        n_rows = max(1, COPIED_BYTES // max(1, self.tensor[0].nbytes))
        for rows, place in zip(self.tensor.split(n_rows), target.split(n_rows), strict=True):
            place.copy_(rows)
            if self.is_mapped:
                release_rows(rows)
        self.release()

    def release(self) -> None:
        release_pages(self.mapped)


@dataclass(frozen=True)
class Stored:
    """A folder's tensors, memory-mapped, under Meta's names and in Meta's layout.

    `shards` holds the tensors by shard number and name; all safetensors files together count as one
    shard. `tied`: the output matrix is the embedding. `hf_args` is set if the files have Hugging
    Face's layout (hf/layout.py). A quantized release's matrices are kept as their stored parts
    (meta_quantized/).
    """

    shards: Mapping[int, Mapping[str, Tensor]]
    tied: bool
    hf_args: ModelArgs | None = None
    kind: Kind = Kind.PLAIN

    def names(self) -> list[str]:
        """The names of all tensors in the files."""
        return list(dict.fromkeys(name for shard in self.shards.values() for name in shard))

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype in the files; if its parts differ, the narrowest that holds them all."""
        return reduce(torch.promote_types, (tensor.dtype for tensor in self._mapped(name).values()))

    def parts(self, name: str) -> list[TensorSlice]:
        """Each shard's part of a tensor, in order; empty if no shard has one."""
        return [TensorSlice(self._in_metas_form(name, part), part) for part in self._mapped(name).values()]

    def slices(self, name: str, ranges: list[range] | None = None) -> list[TensorSlice]:
        """The slices with these ranges along `split_dim(name)` (None: all), in the order given."""
        dim = split_dim(name)
        if dim is None:
            return self.parts(name)[:1]  # every shard holds the whole tensor
        if ranges is None:
            return self.parts(name)
        mapped, out = self._mapped(name), []
        for shard, within in places(ranges, next(iter(mapped.values())).shape[dim]):
            rows = mapped[shard].narrow(dim, within.start, len(within))
            out.append(TensorSlice(self._in_metas_form(name, rows), mapped[shard]))
        return out

    def joined(self, name: str, ranges: list[range] | None, dtype: torch.dtype, to: Target) -> Tensor:
        """A tensor's `ranges`, in `dtype`. No copy is made if the mapped pages will do."""
        return join(self.slices(name, ranges), split_dim(name), dtype, to)

    def _mapped(self, name: str) -> dict[int, Tensor]:
        name = EMBEDDING if self.tied and name == OUTPUT else name
        return {number: shard[name] for number, shard in self.shards.items() if name in shard}

    def _in_metas_form(self, name: str, stored: Tensor) -> Tensor:
        return from_hf(name, stored, self.hf_args) if self.hf_args else stored


def join(slices: list[TensorSlice], dim: int | None, dtype: torch.dtype, to: Target) -> Tensor:
    """Join slices of a tensor along `dim`, as `Stored.joined` does."""
    first = slices[0].tensor
    may_be_used = len(slices) == 1 and not (to.in_memory and slices[0].is_mapped)
    if may_be_used and first.is_contiguous() and first.dtype == dtype and first.device == torch.device(to.device):
        if not slices[0].is_mapped:
            slices[0].release()
        return first
    dim = dim or 0
    sizes = [each.tensor.shape[dim] for each in slices]
    shape = list(first.shape)
    shape[dim] = sum(sizes)
    whole = torch.empty(shape, dtype=dtype, device=to.device)
    for each, target in zip(slices, whole.split(sizes, dim), strict=True):
        each.copy_to(target, to.copier)
    return whole


def open_stored(folder: CheckpointFolder, args: ModelArgs, wanted: Wanted | None = None, *, check: bool = True) -> Stored:
    """Map the files that hold any of `wanted` (None: all files).

    `check` rejects tensors that are missing, unexpected or misshapen, all of them in one message;
    without it, a folder may hold any tensors. Raises CheckpointError for these, and always for files
    that are not checkpoints.
    """
    if folder.is_hugging_face:
        return _open_safetensors(folder, args, check)
    kind = kind_of(args, folder.path)
    if check and folder.is_quantized:
        raise CheckpointError(f"{folder.path} is quantized: use the folder that it was made from")
    return _open_shards(folder, args, kind, wanted, check)


def _open_shards(folder: CheckpointFolder, args: ModelArgs, kind: Kind, wanted: Wanted | None, check: bool) -> Stored:
    shapes, n_shards = expected_shapes(args), len(folder.shards)
    expected = _expected(folder, args, kind) if check else {}
    _check_even(folder, expected)
    numbers = _needed_shards(wanted, shapes, n_shards) if wanted else range(n_shards)
    shards = {number: own_names(read_shard(folder.shards[number]), args) for number in sorted(numbers)}
    if check:
        files = {folder.shards[number].name: shard for number, shard in shards.items()}
        for file, tensors in files.items():
            if wrong := contradiction(dtypes_and_shapes(tensors), args, kind):
                raise CheckpointError(f"{folder.path}: {file}: {wrong}")
        _check_tensors(folder, files, expected, n_shards)
        _check_copies(folder, shards)
    return Stored(shards, _shares_embedding(shards.values()), kind=kind)


def _expected(folder: CheckpointFolder, args: ModelArgs, kind: Kind) -> Mapping[str, Expected]:
    try:
        return tensors_of(args, kind)
    except CheckpointError as error:
        raise CheckpointError(f"{folder.path} cannot be loaded: {error}") from None


def _needed_shards(wanted: Wanted, expected: Mapping[str, tuple[int, ...]], n_shards: int) -> set[int]:
    """The shards to read: at least one, which then gives the tensors that every shard holds whole."""
    needed = set()
    for name, ranges in wanted.items():
        dim = split_dim(name)
        if dim is not None:
            size = expected[name][dim]
            needed |= {shard for shard, _ in places(ranges or [range(size)], size // n_shards)}
    return needed or {0}


def _open_safetensors(folder: CheckpointFolder, args: ModelArgs, check: bool) -> Stored:
    files = {path.name: map_safetensors(path) for path in folder.shards}
    if args.has_vision:
        files = _in_usual_names(files)
        check = True  # the layout can be converted only for the expected shapes
    tensors = _all_tensors(files.values())
    tied = folder.says_tied() and not _holds_output(folder, tensors)
    if tied:
        tensors.pop(hf_name(OUTPUT), None)  # files may hold a copy
    kind = Kind.INT8 if is_int8(tensors) and not args.has_vision else Kind.PLAIN
    if check and kind is Kind.PLAIN and any(tensor.dtype == torch.int8 for tensor in tensors.values()):
        raise CheckpointError(f"{folder.path} holds int8 matrices without their scales (….SCB); fetch all of its files again")
    if check:
        _check_unique(folder, files)
        needed = {  # config.json says whether it is tied
            name: tensor._replace(may_be_tied=False)
            for name, tensor in tensors_in_files(args, kind).items()
            if not (tied and name == hf_name(OUTPUT))
        }
        _check_tensors(folder, {_file_names(folder): tensors}, needed)
    return Stored({0: under_metas_names(tensors, args, kind)}, tied, args, kind)


def _in_usual_names(files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """A vision model's files with the usual names of its tensors; a text model's as they are."""
    is_other = any(name.startswith(OTHER_TEXT_MODEL) for held in files.values() for name in held)
    rename = usual_name if is_other else str
    return {file: {rename(name): tensor for name, tensor in held.items()} for file, held in files.items()}


def stored_kind(folder: CheckpointFolder, args: ModelArgs) -> Kind:
    """How a release stores its matrices; PLAIN for folders that this package quantized.

    Raises CheckpointError.
    """
    if folder.is_quantized:
        return Kind.PLAIN
    if folder.is_hugging_face:
        return Kind.INT8 if is_int8([name for path in folder.shards for name in inspect_safetensors(path)]) else Kind.PLAIN
    return kind_of(args, folder.path)


def is_tied(folder: CheckpointFolder) -> bool:
    """Whether a folder's output matrix is its embedding.

    Reads no weights, except to compare the two tables in an int4 release, and where config.json
    ties an output that the files also hold. Raises CheckpointError.
    """
    if folder.is_hugging_face:
        return folder.says_tied() and not _holds_output(folder, _all_tensors(map(map_safetensors, folder.shards)))
    if folder.is_quantized:
        return not has_output(name for path in folder.shards for name in inspect_safetensors(path))
    args = folder.read_args()
    shards = {path: own_names(read_shard(path), args) for path in folder.shards}
    for path, shard in shards.items():
        if EMBEDDING not in shard:
            other = foreign_names(shard, expected_shapes(args))
            raise CheckpointError(f"{path} holds no {EMBEDDING}; {other or 'it is not a shard of a Llama 3'}")
    if kind_of(args, folder.path) is Kind.INT4:
        return tables_are_equal(shards.values())
    return _shares_embedding(shards.values())


def _all_tensors(files: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for held in files for name, tensor in held.items()}


def _holds_output(folder: CheckpointFolder, tensors: Mapping[str, Tensor]) -> bool:
    """Whether safetensors hold a separate output matrix although config.json ties it.

    Such an output is used, as in transformers from version 5 on; a copy of the embedding does not
    count.
    """
    output, embedding = tensors.get(hf_name(OUTPUT)), tensors.get(hf_name(EMBEDDING))
    if output is None or (embedding is not None and same_bytes(output, embedding)):
        return False
    logger.warning(
        "%s says tie_word_embeddings, but the files hold another %s, which is used; set tie_word_embeddings to false "
        "for programs that would discard it",
        printable(str(folder.params)),
        hf_name(OUTPUT),
    )
    return True


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two mapped tensors have the same dtype, shape and bytes; stops at the first difference."""
    if a.dtype != b.dtype or a.shape != b.shape or not a.numel():
        return False
    n_rows = max(1, COPIED_BYTES // max(1, a[0].nbytes))
    blocks = zip(a.split(n_rows), b.split(n_rows), strict=True)
    same = all(torch.equal(_bytes(x), _bytes(y)) for x, y in blocks)
    release_pages(a)
    release_pages(b)
    return same


def _bytes(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)


def tables_are_equal(shards: Iterable[Mapping[str, Tensor]]) -> bool:
    """Whether an int4 release's output is its embedding, to the byte, in every shard."""
    missing = torch.empty(0, device="cpu")
    return all(
        same_bytes(shard.get(f"tok_embeddings.{part}", missing), shard.get(f"output.{part}", missing))
        for shard in shards
        for part in ("scales", "weight")
    )


def has_output(names: Iterable[str]) -> bool:
    """Whether a quantized folder has a separate output matrix; otherwise the output is tied."""
    return any(name.startswith("output.") for name in names)


def read_shard(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a .pth file, by name. Nothing in the file is executed.

    Raises CheckpointError for a file that is not an archive of tensors, is cut short or contradicts
    itself, or whose pickle asks for anything but tensors.
    """
    with opened(path) as file:
        held = inspect_open_pth(file)  # checks that every tensor lies within the file
        memory = map_file(file)
    storages: dict[tuple[str, str], Tensor] = {}
    tensors = {}
    for name, info in held.items():
        if not is_ignored(name):
            key = info.storage_key, info.dtype
            if key not in storages:
                storages[key] = _storage(memory, info)
            tensors[name] = storages[key].as_strided(info.shape, info.stride, info.storage_offset)
    return tensors


def _storage(memory: mmap.mmap, info: TensorInfo) -> Tensor:
    """The whole storage of which a tensor in a .pth file is a part."""
    dtype = getattr(torch, info.dtype)
    n_elements = info.storage_nbytes // dtype.itemsize
    if not n_elements:
        return torch.empty(0, dtype=dtype, device="cpu")
    return torch.frombuffer(memory, dtype=dtype, count=n_elements, offset=info.data_offset)


def release_pages(tensor: Tensor) -> None:
    """Release a mapped tensor's pages, which otherwise count as memory until it is unmapped."""
    # A strided tensor may span more or fewer bytes than its nbytes.
    if not sys.platform.startswith("linux") or not tensor.is_contiguous():
        return
    # Only pages that hold nothing else.
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def release_rows(rows: Tensor) -> None:
    """Release the pages of some rows of a mapped matrix; for cut columns, also those in between."""
    if rows.numel():
        span = 1 + sum((size - 1) * stride for size, stride in zip(rows.shape, rows.stride(), strict=True))
        release_pages(rows.as_strided((span,), (1,)))


def _check_tensors(
    folder: CheckpointFolder, files: Mapping[str, Mapping[str, Tensor]], expected: Mapping[str, Expected], n_shards: int = 1
) -> None:
    described = {file: dtypes_and_shapes(tensors) for file, tensors in files.items()}
    if not folder.is_hugging_face:
        _check_number(folder, described, expected)
    for file, tensors in files.items():
        if other := foreign_names(tensors, expected):
            raise CheckpointError(f"{folder.path}: the weights do not fit {folder.params.name}: {file}: {other}")
    problems = []
    for file, wrong in misfits(described, expected, n_shards).items():
        problems += [f"{file}: {problem}" for problem in wrong]
        surplus = sorted(strangers(described[file], expected))
        problems += [f"{file}: {name} {described[file][name][1]} is unexpected" for name in surplus]
    check_problems(folder, problems)


def _check_number(
    folder: CheckpointFolder, shards: Mapping[str, Mapping[str, DtypeAndShape]], expected: Mapping[str, Expected]
) -> None:
    """Raise CheckpointError if the last shards are missing: their numbers show no gap then."""
    embeddings = [shard[EMBEDDING][1] for shard in shards.values() if EMBEDDING in shard]
    n_here, n_shards = len(folder.shards), implied_shards(embeddings[0], expected[EMBEDDING].shape[0]) if embeddings else None
    if n_shards and n_shards > n_here and not any(misfits(shards, expected, n_shards).values()):
        missing = comma_list([with_hint(folder.path / shard_name(n)) for n in range(n_here, n_shards)], MOST_LISTED)
        why = f"the shapes of the tensors imply {n_shards} shards"
        raise CheckpointError(f"{folder.path} lacks {missing}: {why}; fetch what is missing")


def check_problems(folder: CheckpointFolder, problems: list[str]) -> None:
    """Raise CheckpointError with a list of the problems, if there are any."""
    if problems:
        more = f"\n  … and {len(problems) - MOST_LISTED} more" if len(problems) > MOST_LISTED else ""
        listed = "".join(f"\n  {problem}" for problem in problems[:MOST_LISTED])
        raise CheckpointError(f"{folder.path}: the weights do not fit {folder.params.name}:{listed}{more}")


def _check_copies(folder: CheckpointFolder, shards: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Raise CheckpointError if shards differ in the norms, which each holds whole."""
    first, *others = shards
    for name in shards[first]:
        for other in others if split_dim(name) is None else ():
            one, another = shards[first][name], shards[other][name]
            if one.dtype == another.dtype and not torch.equal(_bytes(one), _bytes(another)):
                raise CheckpointError(
                    f"{folder.path}: {folder.shards[first].name} and {folder.shards[other].name} hold different copies of "
                    f"{name}: they belong to different models; fetch all files from the same release"
                )


def _check_even(folder: CheckpointFolder, expected: Mapping[str, Expected]) -> None:
    n_shards = len(folder.shards)
    for name, (shape, *_) in expected.items():
        dim = split_dim(name)
        if dim is not None and shape[dim] % n_shards:
            raise CheckpointError(
                f"{folder.path}: {n_shards} shards cannot hold equal parts of {name} {shape} (from {folder.params.name}); "
                "do all shards belong to this model?"
            )


def _check_unique(folder: CheckpointFolder, files: Mapping[str, Collection[str]]) -> None:
    owner: dict[str, str] = {}
    for file, names in files.items():
        for name in names:
            if name in owner:
                raise CheckpointError(
                    f"{folder.path}: {owner[name]} and {file} both hold {name}: the folder mixes files of two downloads; "
                    "remove the files of one of them"
                )
            owner[name] = file


def _file_names(folder: CheckpointFolder) -> str:
    first, *others = folder.shards
    return f"{first.name} and {len(others)} more" if others else first.name


def _shares_embedding(shards: Iterable[Mapping[str, Tensor]]) -> bool:
    """Whether the output is tied: it is missing in the files, or shares the embedding's bytes."""
    return all(
        OUTPUT not in shard or (EMBEDDING in shard and shard[OUTPUT].data_ptr() == shard[EMBEDDING].data_ptr())
        for shard in shards
    )
