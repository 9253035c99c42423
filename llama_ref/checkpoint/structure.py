"""What can be said about a checkpoint's files without reading their weights: kind, size, tensors against params.json."""

import binascii
import json
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llama_ref.args import PARAMS_LIMIT_BYTES, ModelArgs
from llama_ref.checkpoint.archive_length import archive_length
from llama_ref.checkpoint.folder import SHARD_NAME
from llama_ref.checkpoint.inspect_pth import TensorInfo, inspect_pth
from llama_ref.checkpoint.presence import size_of
from llama_ref.checkpoint.report import STATE_OF_IMPOSTOR, State
from llama_ref.checkpoint.shapes import Shape, expected_shapes, misfits, other_kind, shard_shape, strangers
from llama_ref.checkpoint.tensor_pickle import RefusedPickle
from llama_ref.errors import CheckpointError
from llama_ref.files import read_head, read_small, what_is
from llama_ref.tokenizer import MAX_FILE_BYTES, N_SPECIAL, read_ranks

TORN_VALUE = re.compile(r"(t|tr|tru|f|fa|fal|fals|n|nu|nul|-|\.|[eE][+-]?)?\s*")  # what a cut leaves of a JSON value
MOST_SHARDS = 256  # Meta's largest release has 16; a damaged number must not make millions of files "missing"
MOST_LISTED = 4  # wrong tensors named in one detail


@dataclass(frozen=True)
class Finding:
    """What is wrong with one file's structure; `if_altered` is the better word where its sum shows it to be changed."""

    state: State
    detail: str
    expected_size: int | None = None
    if_altered: State | None = None


@dataclass
class Structure:
    """Findings by file name (a sound file has none), and what was learnt on the way."""

    findings: dict[str, Finding] = field(default_factory=dict)
    tensors: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    n_shards: int | None = None  # as the tensors' shapes tell, however many files are there
    notes: list[str] = field(default_factory=list)


def examine(folder: Path, names: Iterable[str], *, trust_params: bool = True) -> Structure:
    """Look at each named file of `folder` that exists. Nothing is executed, and no more than a few MB read.

    With `trust_params` false (params.json is known to be damaged) shards and tokenizer are looked at by themselves only.
    """
    found = Structure()
    names = list(names)
    for name in names:
        if finding := _kind_of_file(folder / name):
            found.findings[name] = finding
    args = _read_params(folder, names, found)
    _examine_tokenizer(folder, names, found, args if trust_params else None)
    _examine_shards(folder, names, found, args if trust_params else None)
    return found


def _kind_of_file(path: Path) -> Finding | None:
    try:
        kind = what_is(read_head(path))
    except CheckpointError as error:
        return Finding(State.UNREADABLE, _without_path(error, path))
    return Finding(STATE_OF_IMPOSTOR[kind], kind) if kind else None


def _without_path(error: CheckpointError, path: Path) -> str:
    text = str(error)
    for lead in (f"{path}: ", f"{path} cannot be used: ", f"{path} is ", f"{path} "):
        text = text.removeprefix(lead)
    return text


# params.json and tokenizer.model ------------------------------------------------------------------------------------------


def _read_params(folder: Path, names: list[str], found: Structure) -> ModelArgs | None:
    if "params.json" not in names or "params.json" in found.findings:
        return None
    path = folder / "params.json"
    try:
        return ModelArgs.from_json(path)
    except CheckpointError as error:
        found.findings["params.json"] = Finding(_how_json_broke(path), _without_path(error, path))
        return None


def _how_json_broke(path: Path) -> State:
    """Cut short if all that is there may be the beginning of an object, longer if a whole one stands before something else."""
    try:
        text = read_small(path, PARAMS_LIMIT_BYTES, "params.json").decode("utf-8", "replace")
        json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return State.LONGER
        in_a_string = error.msg.startswith("Unterminated") and not text.rstrip().endswith("}")
        if text.startswith("{") and (in_a_string or TORN_VALUE.fullmatch(text, error.pos)):
            return State.CUT_SHORT
    except (CheckpointError, ValueError, RecursionError):
        pass
    return State.DAMAGED


def _examine_tokenizer(folder: Path, names: list[str], found: Structure, args: ModelArgs | None) -> None:
    name, path = "tokenizer.model", folder / "tokenizer.model"
    if name not in names or name in found.findings:
        return
    n_expected = args.vocab_size - N_SPECIAL if args else None
    try:
        n_ranks = len(read_ranks(path))
    except CheckpointError as error:
        broken = _how_ranks_broke(path, n_expected)
        found.findings[name] = Finding(broken, _without_path(error, path), if_altered=broken)
        return
    if n_expected not in (None, n_ranks):
        detail = f"{n_ranks + N_SPECIAL:,} tokens, but params.json has vocab_size {args.vocab_size:,}"
        found.findings[name] = Finding(State.MISFIT, detail, if_altered=_how_ranks_broke(path, n_expected))


def _how_ranks_broke(path: Path, n_expected: int | None) -> State:
    """Cut short if all that is there is a flawless beginning, longer if the whole vocabulary stands before something else."""
    try:
        *lines, rest = read_small(path, MAX_FILE_BYTES, "a tokenizer").split(b"\n")
    except CheckpointError:
        return State.DAMAGED
    n_sound = next((rank for rank, line in enumerate(lines) if not _is_rank(line, rank)), len(lines))
    if n_sound == len(lines) and (n_sound < n_expected if n_expected else rest):
        return State.CUT_SHORT
    if n_expected and n_sound >= n_expected and (len(lines) > n_expected or rest):
        return State.LONGER
    return State.DAMAGED


def _is_rank(line: bytes, rank: int) -> bool:
    token, _, number = line.partition(b" ")
    try:
        return binascii.b2a_base64(binascii.a2b_base64(token), newline=False) == token and number == str(rank).encode()
    except binascii.Error:
        return False


# shards -------------------------------------------------------------------------------------------------------------------


def _examine_shards(folder: Path, names: list[str], found: Structure, args: ModelArgs | None) -> None:
    shards = [name for name in names if SHARD_NAME.fullmatch(name)]
    for name in shards:
        if name in found.findings:
            continue
        try:
            found.tensors[name] = inspect_pth(folder / name)
        except CheckpointError as error:
            found.findings[name] = _why_broken(folder / name, error)
    expected = _expected_shapes(folder, args, found) if args and shards else None
    if expected:
        _compare_with_params(shards, found, args, expected)
    _measure_broken(folder, shards, found, expected)


def _why_broken(path: Path, error: CheckpointError) -> Finding:
    size, whole = size_of(path) or 0, None
    with suppress(OSError):
        whole = archive_length(path)
    if whole and whole != size:
        return Finding(State.CUT_SHORT if size < whole else State.LONGER, _without_path(error, path), whole)
    state = State.REFUSED if isinstance(error, RefusedPickle) else State.DAMAGED
    return Finding(state, _without_path(error, path), whole)


def _expected_shapes(folder: Path, args: ModelArgs, found: Structure) -> dict[str, Shape] | None:
    """Whole tensors' shapes by name; None with a note for the kinds of release whose tensors are others."""
    kind = other_kind(args, folder)
    if kind:
        found.notes.append(f"{kind}: its tensors were not compared with params.json")
        return None
    return expected_shapes(args)


def _compare_with_params(shards: list[str], found: Structure, args: ModelArgs, expected: Mapping[str, Shape]) -> None:
    inspected = found.tensors.values()
    found.n_shards = next((n for tensors in inspected if (n := _n_shards(tensors, args))), None) or len(shards)
    described = {
        file: {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        for file, tensors in found.tensors.items()
    }
    for name, wrong in misfits(described, expected, found.n_shards).items():
        problems = wrong + [f"{stranger} is unexpected" for stranger in strangers(found.tensors[name], expected)]
        if problems:
            more = f", and {len(problems) - MOST_LISTED} more" if len(problems) > MOST_LISTED else ""
            found.findings[name] = Finding(State.MISFIT, "; ".join(problems[:MOST_LISTED]) + more)


def _n_shards(tensors: Mapping[str, TensorInfo], args: ModelArgs) -> int | None:
    """How many shards the release must have, by this one's share of the vocabulary."""
    rows = tensors["tok_embeddings.weight"].shape[:1] if "tok_embeddings.weight" in tensors else ()
    if not rows or not rows[0] or args.vocab_size % rows[0]:
        return None
    n_shards = args.vocab_size // rows[0]
    return n_shards if n_shards <= MOST_SHARDS else None


def _measure_broken(folder: Path, shards: list[str], found: Structure, expected: Mapping[str, Shape] | None) -> None:
    """Judge broken shards by the size of a sound one (all of a release are alike), or at least by what params.json implies."""
    sound = max((size_of(folder / name) or 0 for name in found.tensors), default=None)
    least = sound or (_least_bytes(expected, found.n_shards or len(shards)) if expected else 0)
    for name in shards:
        finding, size = found.findings.get(name), size_of(folder / name) or 0
        if finding is None or name in found.tensors:
            continue
        if size == sound and finding.state in (State.CUT_SHORT, State.LONGER):
            found.findings[name] = Finding(State.DAMAGED, finding.detail, sound)
        elif sound and size < sound and finding.state is State.CUT_SHORT:
            found.findings[name] = Finding(State.CUT_SHORT, finding.detail, sound)
        elif size < least and finding.expected_size is None:
            cut = finding.state in (State.DAMAGED, State.REFUSED) and _starts_as_archive(folder / name)
            found.findings[name] = Finding(State.CUT_SHORT if cut else finding.state, finding.detail, least)


def _least_bytes(expected: Mapping[str, Shape], n_shards: int) -> int:
    return sum(math.prod(shard_shape(name, shape, n_shards)) for name, shape in expected.items()) * torch.bfloat16.itemsize


def _starts_as_archive(path: Path) -> bool:
    return b"PK\3\4".startswith(read_head(path, 4))
