"""Check a folder's files without reading weights: kind, size, tensors against params.json."""

import binascii
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.advice.foreign_names import foreign_names
from llama_ref.checkpoint.folder import SAFETENSORS_NAME, SHARD_NAME, shard_name, shard_number
from llama_ref.checkpoint.formats.pth import TensorInfo, archive_records, inspect_pth
from llama_ref.checkpoint.formats.pth_length import archive_length
from llama_ref.checkpoint.formats.pth_pickle import ITEM_BYTES, RefusedPickle
from llama_ref.checkpoint.formats.pth_zip import BadArchive, read_at
from llama_ref.checkpoint.formats.safetensors import inspect_safetensors
from llama_ref.checkpoint.hf.config import read_config
from llama_ref.checkpoint.hf.tokenizer import MAX_FILE_BYTES as MAX_TOKENIZER_JSON_BYTES
from llama_ref.checkpoint.hf.tokenizer import read_tokenizer_json
from llama_ref.checkpoint.meta_quantized.kinds import (
    Kind,
    contradiction,
    kind_of,
    scales_name,
    scales_number,
    tensors_of,
    wrong_scales,
)
from llama_ref.checkpoint.shapes import (
    EMBEDDING,
    MOST_SHARDS,
    WEIGHT_DTYPES,
    DtypeAndShape,
    Expected,
    implied_shards,
    misfits,
    own_names,
    shard_shape,
    strangers,
)
from llama_ref.checkpoint.size_limits import check_limit
from llama_ref.checkpoint.verify.findings import (
    Finding,
    Structure,
    contradicted_params,
    how_json_broke,
    implied_model,
    impostor_finding,
    listed,
    without_path,
)
from llama_ref.checkpoint.verify.hf_shards import examine_safetensors
from llama_ref.checkpoint.verify.hf_shards import why_broken as why_broken_safetensors
from llama_ref.checkpoint.verify.presence import HUGGING_FACE, Format, size_of
from llama_ref.checkpoint.verify.report import State
from llama_ref.errors import CheckpointError, UnsupportedModel
from llama_ref.files import read_head, read_json, read_small
from llama_ref.vocabulary import ADDED_TOKENS, MAX_FILE_BYTES, N_SPECIAL, dropped_tokens, read_ranks, read_tokenizer_model

__all__ = ["Finding", "Structure", "examine", "oversize_finding"]

SAMPLE_BYTES = 4096

T = TypeVar("T")


def examine(
    folder: Path,
    names: Iterable[str],
    form: Format,
    *,
    not_to_open: Collection[str] = (),
    params_are_right: bool | None = None,
) -> Structure:
    """Check the structure of each named file. Runs no code and reads at most a few MB of weights.

    `params_are_right` says whether the checksum of params.json or config.json is right. If False,
    weights and tokenizer are not compared with it. If None (unknown), it may be blamed if the
    weights do not match it.
    """
    found, all_names = Structure(), list(names)
    names = [name for name in all_names if name not in not_to_open]
    for name in names:
        if finding := oversize_finding(folder / name) or impostor_finding(folder / name):
            found.findings[name] = finding
    may_blame_params = params_are_right is None
    if form is HUGGING_FACE:
        config = _read_params(read_config, folder, names, form, found)
        config = None if params_are_right is False else config
        implied = examine_safetensors(folder, all_names, names, found, config, may_blame_params)
        args = implied or (config.args if config else None)
        _examine_json_files(folder, names, found)
    else:
        args = _read_params(ModelArgs.from_json, folder, names, form, found)
        args = None if params_are_right is False else args
        implied, n_shards = _examine_shards(folder, names, found, args, may_blame_params)
        args = implied or args
        _count_shards(all_names, found, n_shards)
        if args and kind_of(args, folder) is Kind.FP8:
            _examine_scales(folder, names, found, args)
        _examine_quantized(folder, names, found)
        _examine_json_files(folder, [name for name in names if name != ADDED_TOKENS], found)
    _examine_tokenizer(folder, names, form, found, args)
    return found


def oversize_finding(path: Path) -> Finding | None:
    """A finding if a small file is larger than its name allows."""
    try:
        check_limit(path, size_of(path) or 0)
    except CheckpointError as error:
        return Finding(State.LONGER, without_path(error, path))
    return None


# params.json, config.json and similar --------------------------------------------------------------------------------------


def _read_params(read: Callable[[Path], T], folder: Path, names: list[str], form: Format, found: Structure) -> T | None:
    path = folder / form.params
    if form.params not in names or form.params in found.findings:
        return None
    try:
        return read(path)
    except UnsupportedModel as error:
        found.findings[form.params] = Finding(State.UNSUPPORTED, without_path(error, path))
        return None
    except CheckpointError as error:
        state = how_json_broke(path) or (State.MISFIT if form is HUGGING_FACE else State.DAMAGED)
        found.findings[form.params] = Finding(state, without_path(error, path))
        return None


def _examine_json_files(folder: Path, names: list[str], found: Structure) -> None:
    """Check the JSON files that only Hugging Face's library reads."""
    for name in names:
        if name in HUGGING_FACE.others and name.endswith(".json") and name not in found.findings:
            path = folder / name
            try:
                is_object = isinstance(read_json(path, MAX_FILE_BYTES, "a JSON object"), dict)
                detail = "" if is_object else "it is not a JSON object"
            except CheckpointError as error:
                detail = without_path(error, path)
            if detail:
                found.findings[name] = Finding(how_json_broke(path, MAX_FILE_BYTES) or State.DAMAGED, detail)


# tokenizers ---------------------------------------------------------------------------------------------------------------


def _examine_tokenizer(folder: Path, names: list[str], form: Format, found: Structure, args: ModelArgs | None) -> None:
    """Check the tokenizer that would be used."""
    name = next((name for name in form.tokenizers if name in names), None)
    if name is None or name in found.findings:
        return
    params = found.findings.get(form.params)
    if params and params.state is State.UNSUPPORTED:
        _examine_unknown_tokenizer(folder, name, found)
    elif name.endswith(".json"):
        _examine_tokenizer_json(folder, name, form, found, args)
    elif ADDED_TOKENS in names and ADDED_TOKENS not in found.findings:
        _examine_with_added(folder, name, form, found, args)
    else:
        _examine_ranks(folder, name, form, found, args)


def _examine_unknown_tokenizer(folder: Path, name: str, found: Structure) -> None:
    """Check the tokenizer of an unsupported model: only whether it is valid JSON."""
    if name.endswith(".json") and (state := how_json_broke(folder / name, MAX_TOKENIZER_JSON_BYTES)):
        found.findings[name] = Finding(state, "it is not valid JSON")


def _state_of_other(form: Format) -> State:
    """The state of another model's tokenizer: Meta's params.json belongs to a Llama 3, config.json need not."""
    return State.UNSUPPORTED if form is HUGGING_FACE else State.MISFIT


def _examine_tokenizer_json(folder: Path, name: str, form: Format, found: Structure, args: ModelArgs | None) -> None:
    path = folder / name
    try:
        vocabulary = read_tokenizer_json(path)
    except UnsupportedModel as error:
        found.findings[name] = Finding(_state_of_other(form), without_path(error, path))
        return
    except CheckpointError as error:
        state = how_json_broke(path, MAX_TOKENIZER_JSON_BYTES) or State.MISFIT
        found.findings[name] = Finding(state, without_path(error, path))
        return
    if args is None:
        return
    if beyond := vocabulary.beyond(args.vocab_size):
        found.notes.append(f"{name}: {dropped_tokens(beyond, args.vocab_size)}")
    n_words = vocabulary.without_beyond(args.vocab_size).n_words
    if n_words > args.vocab_size:  # fewer are common: fine-tunes pad the embedding
        found.findings[name] = Finding(State.MISFIT, _wrong_count(n_words, form, args))


def _examine_with_added(folder: Path, name: str, form: Format, found: Structure, args: ModelArgs | None) -> None:
    """Check tokenizer.model and added_tokens.json, which have `vocab_size` tokens only together."""
    path, added = folder / name, folder / ADDED_TOKENS
    _examine_ranks(folder, name, form, found, None)
    if name in found.findings:
        return
    try:
        n_words = read_tokenizer_model(path).n_words
    except CheckpointError as error:
        state = how_json_broke(added, MAX_FILE_BYTES) or State.MISFIT
        found.findings[ADDED_TOKENS] = Finding(state, without_path(error, added))
        return
    if args and n_words != args.vocab_size:
        detail = f"with them {name} has {_wrong_count(n_words, form, args)}"
        found.findings[ADDED_TOKENS] = Finding(State.MISFIT, detail)


def _examine_ranks(folder: Path, name: str, form: Format, found: Structure, args: ModelArgs | None) -> None:
    path = folder / name
    n_expected = args.vocab_size - N_SPECIAL if args else None
    try:
        n_ranks = len(read_ranks(path))
    except UnsupportedModel as error:
        found.findings[name] = Finding(_state_of_other(form), without_path(error, path))
        return
    except CheckpointError as error:
        broken = _how_ranks_broke(path, n_expected)
        found.findings[name] = Finding(broken, without_path(error, path), if_altered=broken)
        return
    if args and n_ranks != n_expected:
        detail = _wrong_count(n_ranks + N_SPECIAL, form, args)
        found.findings[name] = Finding(State.MISFIT, detail, if_altered=_how_ranks_broke(path, n_expected))


def _wrong_count(n_words: int, form: Format, args: ModelArgs) -> str:
    return f"{n_words:,} tokens, but {form.params} has vocab_size {args.vocab_size:,}"


def _how_ranks_broke(path: Path, n_expected: int | None) -> State:
    """CUT_SHORT for a correct beginning, LONGER for the vocabulary followed by something else."""
    try:
        *lines, rest = read_small(path, MAX_FILE_BYTES, "a tokenizer").split(b"\n")
    except CheckpointError:
        return State.DAMAGED
    n_sound = next((rank for rank, line in enumerate(lines) if not _is_rank_line(line, rank)), len(lines))
    if n_sound == len(lines) and (n_sound < n_expected if n_expected else rest):
        return State.CUT_SHORT
    if n_expected and n_sound >= n_expected and (len(lines) > n_expected or rest):
        return State.LONGER
    return State.DAMAGED


def _is_rank_line(line: bytes, rank: int) -> bool:
    token, _, number = line.partition(b" ")
    try:
        return binascii.b2a_base64(binascii.a2b_base64(token), newline=False) == token and number == str(rank).encode()
    except binascii.Error:
        return False


# shards -------------------------------------------------------------------------------------------------------------------


def _examine_shards(
    folder: Path, names: list[str], found: Structure, args: ModelArgs | None, may_blame_params: bool
) -> tuple[ModelArgs | None, int | None]:
    """Add findings about shards; return their model if only params.json differs, and their number.

    The number is the one that the shapes imply.
    """
    shards = [name for name in names if SHARD_NAME.fullmatch(name)]
    for name in shards:
        if name in found.findings:
            continue
        try:
            tensors = inspect_pth(folder / name)
        except CheckpointError as error:
            found.findings[name] = _why_broken(folder / name, error)
        else:
            found.pth[name] = own_names(tensors, args) if args else tensors
    for name, original in _copies(folder, found.pth).items():
        detail = f"of {original}, or the other way round"
        found.findings[name] = Finding(State.COPY, detail, by_others=True)
    kind = kind_of(args, folder) if args else Kind.PLAIN
    expected = _expected_tensors(args, kind, found) if args and shards else None
    implied, n_shards = None, None
    if args and expected:
        n_shards = next((n for tensors in found.pth.values() if (n := _n_shards(tensors, args))), len(shards))
        odd = {name: contradiction(_described(tensors), args, kind) for name, tensors in found.pth.items()}
        problems = _problems(found.pth, expected, n_shards, odd)
        is_in_all = may_blame_params and len(problems) == len(found.pth)
        blamed = set(filter(None, odd.values()))
        if is_in_all and len(blamed) == 1:
            detail = f"it and {', '.join(found.pth)} contradict each other: of the weights, {blamed.pop()}"
            found.findings["params.json"] = Finding(State.MISFIT, detail)
        elif is_in_all and kind is Kind.PLAIN and (model := _implied_by(found.pth)):
            implied, n_shards = model
            found.findings["params.json"] = contradicted_params(list(found.pth), args, implied, names={})
        else:
            found.findings |= {name: Finding(State.MISFIT, listed(wrong)) for name, wrong in problems.items()}
    _measure_broken(folder, shards, found, expected, n_shards or len(shards))
    return implied, n_shards


def _examine_scales(folder: Path, names: list[str], found: Structure, args: ModelArgs) -> None:
    """Check the scales of an fp8 release's shards, one file for each."""
    n_shards = len(found.needed)
    for rank in range(n_shards):
        name = scales_name(rank)
        found.needed.append(name)
        if name not in names or name in found.findings:
            continue
        try:
            tensors = inspect_pth(folder / name)
        except CheckpointError as error:
            found.findings[name] = _why_broken(folder / name, error)
            continue
        found.pth[name] = tensors
        if wrong := wrong_scales(_described(tensors), args, rank, n_shards):
            found.findings[name] = Finding(State.MISFIT, listed(wrong))
    why = f"there are {n_shards} shards"
    found.surplus |= {name: why for name in names if scales_number(name) >= n_shards}


def _examine_quantized(folder: Path, names: list[str], found: Structure) -> None:
    """Check the safetensors of a folder that this package quantized; its tensors are not Meta's."""
    for name in names:
        if SAFETENSORS_NAME.fullmatch(name) and name not in found.findings:
            try:
                inspect_safetensors(folder / name)
            except CheckpointError as error:
                found.findings[name] = why_broken_safetensors(folder / name, error)


def _copies(folder: Path, shards: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, str]:
    """Shards with the same content as an earlier one, as far as checksums show: copy -> original."""
    originals: dict[object, str] = {}
    copies = {}
    for name, tensors in shards.items():
        with suppress(OSError, BadArchive):
            records = [each for each in archive_records(folder / name) if each.size and "/data/" in each.name]
            # Writers may leave checksums out, so some of the data is compared as well.
            content = tuple((each.size, each.crc) for each in records), _head_of_embedding(folder / name, tensors)
            if all(each.crc for each in records) and originals.setdefault(content, name) != name:
                copies[name] = originals[content]
    return copies


def _head_of_embedding(path: Path, tensors: Mapping[str, TensorInfo]) -> bytes:
    embedding = tensors.get(EMBEDDING)
    with path.open("rb") as file:
        return read_at(file, embedding.file_offset, min(embedding.nbytes, SAMPLE_BYTES)) if embedding else b""


def _count_shards(names: list[str], found: Structure, n_shards: int | None) -> None:
    """Set which shards must exist and which belong to another checkpoint."""
    numbers = [number for name in names if 0 <= (number := shard_number(name)) < MOST_SHARDS]
    found.needed = [shard_name(n) for n in range(max(max(numbers, default=-1) + 1, n_shards or 0))]
    found.is_counted = n_shards is not None
    if n_shards is not None:
        why = f"the shapes of the tensors imply {n_shards} shards"
        found.surplus = {name: why for name in names if shard_number(name) >= n_shards}


def _implied_by(files: Mapping[str, Mapping[str, TensorInfo]]) -> tuple[ModelArgs, int] | None:
    """The model and number of shards that all files agree on."""
    distinct = {frozenset((name, held.dtype, held.shape) for name, held in tensors.items()) for tensors in files.values()}
    if len(distinct) != 1 or any(dtype not in WEIGHT_DTYPES for _, dtype, _ in next(iter(distinct))):
        return None
    return implied_model({name: shape for name, _, shape in next(iter(distinct))})


def _why_broken(path: Path, error: CheckpointError) -> Finding:
    size, expected = size_of(path) or 0, None
    with suppress(OSError):
        expected = archive_length(path)
    if expected and expected != size:
        return Finding(State.CUT_SHORT if size < expected else State.LONGER, without_path(error, path), expected)
    state = State.REFUSED if isinstance(error, RefusedPickle) else State.DAMAGED
    return Finding(state, without_path(error, path), expected)


def _expected_tensors(args: ModelArgs, kind: Kind, found: Structure) -> Mapping[str, Expected] | None:
    """The unsharded tensors by name; None, with a finding, if they are not known."""
    try:
        return tensors_of(args, kind)
    except CheckpointError as error:
        found.findings["params.json"] = Finding(State.MISFIT, str(error))
        return None


def _problems(
    files: Mapping[str, Mapping[str, TensorInfo]],
    expected: Mapping[str, Expected],
    n_shards: int,
    odd: Mapping[str, str | None],
) -> dict[str, list[str]]:
    """By file, the contradictions to params.json; files that match are left out.

    `odd` has, by file, a problem that concerns all tensors; it then replaces the single problems.
    """
    described = {file: _described(tensors) for file, tensors in files.items()}
    problems = {
        file: wrong + [f"{stranger} is unexpected" for stranger in strangers(files[file], expected)]
        for file, wrong in misfits(described, expected, n_shards).items()
    }
    for file in problems:
        if other := foreign_names(files[file], expected) or odd[file]:
            problems[file] = [other]
    return {file: wrong for file, wrong in problems.items() if wrong}


def _described(tensors: Mapping[str, TensorInfo]) -> dict[str, DtypeAndShape]:
    return {name: (held.dtype, held.shape) for name, held in tensors.items()}


def _n_shards(tensors: Mapping[str, TensorInfo], args: ModelArgs) -> int | None:
    """The number of shards implied by this shard's part of the vocabulary."""
    return implied_shards(tensors[EMBEDDING].shape, args.vocab_size) if EMBEDDING in tensors else None


def _measure_broken(
    folder: Path, shards: list[str], found: Structure, expected: Mapping[str, Expected] | None, n_shards: int
) -> None:
    """Judge the size of broken shards by a sound one, else by the minimum from params.json.

    All shards of a release have the same size.
    """
    sound = max((size_of(folder / name) or 0 for name in found.pth), default=None)
    least = sound or (_least_bytes(expected, n_shards) if expected else 0)
    for name in shards:
        finding, size = found.findings.get(name), size_of(folder / name) or 0
        if finding is None or name in found.pth:
            continue
        if size == sound and finding.state in (State.CUT_SHORT, State.LONGER):
            found.findings[name] = Finding(State.DAMAGED, finding.detail, sound)
        elif sound and size < sound and finding.state is State.CUT_SHORT:
            found.findings[name] = Finding(State.CUT_SHORT, finding.detail, sound)
        elif size < least and finding.expected_size is None:
            cut = finding.state in (State.DAMAGED, State.REFUSED) and _starts_as_archive(folder / name)
            found.findings[name] = Finding(State.CUT_SHORT if cut else finding.state, finding.detail, least)


def _least_bytes(expected: Mapping[str, Expected], n_shards: int) -> int:
    least = {
        name: min(ITEM_BYTES[dtype] for dtype in tensor.dtypes) for name, tensor in expected.items() if not tensor.is_optional
    }
    return sum(math.prod(shard_shape(name, expected[name].shape, n_shards)) * size for name, size in least.items())


def _starts_as_archive(path: Path) -> bool:
    return b"PK\3\4".startswith(read_head(path, 4))
