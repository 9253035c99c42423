"""Check safetensors headers, on their own, against config.json and against each other."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.folder import INDEX_LIMIT_BYTES, SAFETENSORS_NAME
from llama_ref.checkpoint.formats.safetensors import REFETCH, HeldTensor, WrongLength, inspect_safetensors
from llama_ref.checkpoint.hf.bitsandbytes import guard_args, is_guard, is_int8
from llama_ref.checkpoint.hf.config import NAMES, HFConfig
from llama_ref.checkpoint.hf.layout import tensors_in_files
from llama_ref.checkpoint.hf.names import hf_name, usual_name
from llama_ref.checkpoint.meta_quantized.kinds import Kind
from llama_ref.checkpoint.shapes import (
    OUTPUT,
    WEIGHT_DTYPES,
    DtypeAndShape,
    Expected,
    expected_shapes,
    is_ignored,
    misfit,
    misfits,
)
from llama_ref.checkpoint.verify.findings import (
    Finding,
    Structure,
    contradicted_params,
    how_json_broke,
    implied_model,
    listed,
    without_path,
)
from llama_ref.checkpoint.verify.presence import INDEX_NAME, ONE_FILE, size_of
from llama_ref.checkpoint.verify.report import State
from llama_ref.errors import CheckpointError
from llama_ref.files import read_json

MOST_FILES = 1000  # a 405B has 191; a damaged number must not make millions of names
LAYER_NAME = re.compile(r"model\.layers\.(\d{1,8})\..+")

Tensors = Mapping[str, HeldTensor]


def examine_safetensors(
    folder: Path, names: Collection[str], openable: Collection[str], found: Structure, config: HFConfig | None, may_blame: bool
) -> ModelArgs | None:
    """Add findings about weight files and index; return their model if only config.json differs.

    `names` are the files that exist or should exist; only the `openable` ones are opened. Only with
    `may_blame` may a finding blame config.json.
    """
    files = [name for name in names if SAFETENSORS_NAME.fullmatch(name)]
    for name in files:
        if name in openable and name not in found.findings:
            try:
                held = inspect_safetensors(folder / name).items()
                found.safetensors[name] = {_usual(tensor, config): info for tensor, info in held if not is_ignored(tensor)}
            except CheckpointError as error:
                found.findings[name] = why_broken(folder / name, error)
    if config is None and "config.json" not in names and is_guard(_described(found.safetensors)):
        config, found.has_known_params = HFConfig(guard_args(), tied=False), True
    index = _read_index(folder, openable, found, config)
    if index is not None and ONE_FILE in files and not index.files & set(files):
        first = min(index.files, default="no file")
        found.findings[INDEX_NAME] = Finding(State.MISFIT, f"it names {first}, but the weights are in {ONE_FILE}")
        index = None
    found.needed, found.surplus = _which_belong(files, index)
    found.is_counted = True
    weights = _Weights(
        {name: tensors for name, tensors in found.safetensors.items() if name in found.needed}, found.needed, index
    )
    if index is not None and (wrong := weights.against_index(index, config)):
        found.findings[INDEX_NAME] = Finding(State.MISFIT, listed(wrong), by_others=True)
    return weights.judge(found, config, may_blame) if weights.files else None


def _usual(name: str, config: HFConfig | None) -> str:
    """Map a vision model's two naming schemes to the usual one; other names are unchanged."""
    return usual_name(name) if config and config.args.has_vision else name


def _described(files: Mapping[str, Tensors]) -> dict[str, DtypeAndShape]:
    return {name: (held.dtype, held.shape) for tensors in files.values() for name, held in tensors.items()}


def why_broken(path: Path, error: CheckpointError) -> Finding:
    """The finding for an error of `inspect_safetensors`."""
    detail = without_path(error, path).removesuffix(REFETCH)  # the report adds its own advice
    if not isinstance(error, WrongLength):
        return Finding(State.DAMAGED, detail)
    expected, size = error.expected_size, size_of(path) or 0
    state = State.LONGER if expected is not None and size > expected else State.CUT_SHORT
    return Finding(state, detail, expected)


@dataclass(frozen=True)
class _Index:
    """The content of model.safetensors.index.json: the file of each tensor."""

    place: dict[str, str]

    @property
    def files(self) -> set[str]:
        return set(self.place.values())


def _read_index(folder: Path, openable: Collection[str], found: Structure, config: HFConfig | None) -> _Index | None:
    if INDEX_NAME not in openable or INDEX_NAME in found.findings:
        return None
    path = folder / INDEX_NAME
    try:
        content = read_json(path, INDEX_LIMIT_BYTES, "an index of safetensors files")
        place = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(place, dict) or not place or not all(isinstance(file, str) for file in place.values()):
            raise CheckpointError('it has no "weight_map" from names of tensors to names of files')
    except CheckpointError as error:
        state = how_json_broke(path, INDEX_LIMIT_BYTES) or State.DAMAGED
        found.findings[INDEX_NAME] = Finding(state, without_path(error, path))
        return None
    if unread := sorted(file for file in set(place.values()) if not SAFETENSORS_NAME.fullmatch(file)):
        detail = f"it names {unread[0]!r:.80}, which is neither {ONE_FILE} nor model-00001-of-0000N.safetensors"
        found.findings[INDEX_NAME] = Finding(State.MISFIT, detail)
        return None
    if len(set(place.values())) > MOST_FILES:
        found.findings[INDEX_NAME] = Finding(State.DAMAGED, f"it names more than {MOST_FILES:,} files")
        return None
    return _Index({_usual(name, config): file for name, file in place.items() if not is_ignored(name)})


def _which_belong(files: list[str], index: _Index | None) -> tuple[list[str], dict[str, str]]:
    """The files of the model, existing or not, and files of other models with the reason.

    The index decides. Without one, a single file is the model, or else the most complete numbering.
    """
    if index is not None:
        needed, why = sorted(index.files), f"{INDEX_NAME} does not name it"
    elif ONE_FILE in files or not files:
        needed, why = [ONE_FILE], f"{ONE_FILE} is a complete model"
    else:
        totals = {name: int(match[2]) for name in files if (match := SAFETENSORS_NAME.fullmatch(name))}
        counts = Counter(totals.values())
        total = max(counts, key=lambda total: (counts[total] / max(total, 1), total))
        needed, why = sorted(name for name in files if totals[name] == total), ""
        if 0 < total <= MOST_FILES:
            needed = [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
            why = f"it is not one of the {total} files whose names end in of-{total:05d}"
    return needed, {name: why for name in files if name not in needed}


@dataclass(frozen=True)
class _Weights:
    """The tensors of those `needed` files that could be opened."""

    files: Mapping[str, Tensors]
    needed: list[str]
    index: _Index | None

    @property
    def is_complete(self) -> bool:
        return len(self.files) == len(self.needed)

    @property
    def owners(self) -> dict[str, list[str]]:
        """Tensor name -> the files that hold it."""
        owners: dict[str, list[str]] = {}
        for file, tensors in self.files.items():
            for name in tensors:
                owners.setdefault(name, []).append(file)
        return owners

    def against_index(self, index: _Index, config: HFConfig | None) -> list[str]:
        """Contradictions between index and files that config.json does not resolve.

        Tensors that no file holds are reported only if no file is missing.
        """
        problems, owners = [], self.owners
        expected = set(_expected(config, owners)) if config else set()
        for name, file in index.place.items():
            holders = owners.get(name, [])
            if holders and file not in holders:
                problems.append(f"{name} is in {holders[0]}, not in {file}")
            elif not holders and self.is_complete and name not in expected:
                problems.append(f"it names {name}, which no file holds")
        unnamed = [name for name in owners if name not in index.place and (name in expected or not config)]
        return problems + [f"it does not name {name} of {owners[name][0]}" for name in unnamed]

    def judge(self, found: Structure, config: HFConfig | None, may_blame: bool) -> ModelArgs | None:
        """Add findings; return the implied model if config.json is the wrong file."""
        duplicates = self._duplicates()
        problems = self._problems(config) if config else {}
        if config and problems and may_blame and not duplicates and self.is_complete and (implied := self._implied(config)):
            found.findings["config.json"] = contradicted_params(self.needed, config.args, implied, NAMES)
            return implied
        for file in self.files:
            if wrong := duplicates.get(file, []) + problems.get(file, []):
                found.findings[file] = Finding(State.MISFIT, listed(wrong), by_others=file not in problems)
        return None

    def _duplicates(self) -> dict[str, list[str]]:
        """By file, tensors that belong to another file: the index's, else the first with them."""
        wrong: dict[str, list[str]] = {}
        for name, files in self.owners.items():
            place = self.index.place.get(name) if self.index else None
            home = place if place in files else files[0]
            for file in files:
                if file != home:
                    wrong.setdefault(file, []).append(f"{name} is also in {home}")
        return wrong

    def _problems(self, config: HFConfig) -> dict[str, list[str]]:
        """By file, the contradictions to config.json."""
        expected = _expected(config, self.owners)
        may_lack = {hf_name(OUTPUT)} if config.tied else set()
        problems: dict[str, list[str]] = {}
        for file, tensors in self.files.items():
            described = {name: (held.dtype, held.shape) for name, held in tensors.items()}
            own = {name: tensor for name, tensor in expected.items() if name in tensors}
            wrong = misfits({file: described}, own, 1)[file]
            wrong += [f"{name} is unexpected" for name in tensors if name not in expected]
            if wrong:
                problems[file] = wrong
        if self.is_complete:
            self._add_missing({name: tensor for name, tensor in expected.items() if name not in may_lack}, problems)
        return problems

    def _add_missing(self, expected: Mapping[str, Expected], problems: dict[str, list[str]]) -> None:
        """Report missing tensors for the file in the index, else for the preceding tensor's."""
        owners, file = self.owners, next(iter(self.files))
        for name, tensor in expected.items():
            file = owners.get(name, [file])[0]
            if name not in owners and not tensor.is_optional:
                place = self.index.place.get(name, file) if self.index else file
                problems.setdefault(place, []).append(misfit(name, None, tensor) or "")

    def _implied(self, config: HFConfig) -> ModelArgs | None:
        """The model that all tensors together imply."""
        held = {name: tensor for tensors in self.files.values() for name, tensor in tensors.items()}
        layers = {int(match[1]) for name in held if (match := LAYER_NAME.fullmatch(name))}
        if any(tensor.dtype not in WEIGHT_DTYPES for tensor in held.values()) or not layers or len(held) <= max(layers):
            return None
        ours = {hf_name(name): name for name in _names_of_layers(max(layers) + 1)}
        model = implied_model({ours.get(name, name): tensor.shape for name, tensor in held.items()}, n_shards=1)
        has_output = hf_name(OUTPUT) in held
        return model[0] if model and (has_output or config.tied) else None


def _expected(config: HFConfig, names: Collection[str]) -> dict[str, Expected]:
    """The model's tensors under Hugging Face's names, in int8 if `names` shows bitsandbytes."""
    return tensors_in_files(config.args, Kind.INT8 if is_int8(names) and not config.args.has_vision else Kind.PLAIN)


def _names_of_layers(n_layers: int) -> list[str]:
    """Names of all tensors of a model with `n_layers` layers, in Meta's naming."""
    least = ModelArgs(
        dim=2, n_layers=n_layers, n_heads=1, n_kv_heads=1, hidden_dim=1, vocab_size=1, norm_eps=1e-5, rope_theta=5e5
    )
    return list(expected_shapes(least))
