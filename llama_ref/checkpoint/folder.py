"""Find a checkpoint folder and say what is in it."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.advice.missing_file import hint_about, with_hint
from llama_ref.checkpoint.advice.unusual_files import how_to_rename
from llama_ref.checkpoint.formats.safetensors import HeldTensor, inspect_safetensors
from llama_ref.checkpoint.hf.bitsandbytes import guard_args, is_guard
from llama_ref.checkpoint.meta_quantized.kinds import Int4Params, Kind, kind_of, scales_name
from llama_ref.checkpoint.releases import RELEASES
from llama_ref.checkpoint.shapes import is_ignored
from llama_ref.checkpoint.spelling import META, as_on_disk, in_hub_cache, model_name, name_key, nearest, snapshots
from llama_ref.errors import CheckpointError, FolderNotFound
from llama_ref.files import read_json
from llama_ref.formatting import comma_list

if TYPE_CHECKING:
    from llama_ref.checkpoint.hf.config import HFConfig
    from llama_ref.tokenizer import Tokenizer

SHARD_NAME = re.compile(r"consolidated\.([0-9]{2}|[1-9][0-9]{2,})\.pth")
SAFETENSORS_NAME = re.compile(r"model(?:-([0-9]{5})-of-([0-9]{5}))?\.safetensors")
QUANTIZATION = "quantization"  # the key in params.json; Meta's own int4 releases have quantization_args
INDEX_NAME = "model.safetensors.index.json"
INDEX_LIMIT_BYTES = 16 << 20  # Llama 3.1 405B's index has 100 kB
MOST_LISTED = 8  # names in one error


@dataclass(frozen=True)
class CheckpointFolder:
    """The files of one checkpoint: Meta's, Hugging Face's or a quantized one (quantized_reader.py).

    `params` is params.json or config.json, `tokenizer` is tokenizer.model or tokenizer.json, and
    `checklist` is checklist.chk. `shards` are in the order of their numbers.
    """

    path: Path
    params: Path
    shards: tuple[Path, ...]
    tokenizer: Path | None
    checklist: Path | None

    @property
    def is_hugging_face(self) -> bool:
        return self.params.name == "config.json"

    @property
    def is_quantized(self) -> bool:
        return self.params.name == "params.json" and self.shards[0].suffix == ".safetensors"

    def read_args(self) -> ModelArgs:
        """Read params.json or config.json. Raises CheckpointError.

        The int8 guard is the only release without either.
        """
        if self.is_hugging_face and not self.params.exists():
            return guard_args()
        if self.is_hugging_face:
            return _read_config(self.params).args
        args = ModelArgs.from_json(self.params)
        if kind_of(args) is Kind.INT4:
            try:
                Int4Params.from_args(args)
            except CheckpointError as error:
                raise CheckpointError(f"{self.params}: {error}") from None
        return args

    def says_tied(self) -> bool:
        """Whether config.json ties the output to the embedding. Raises CheckpointError."""
        if not self.params.exists():
            return False
        return _read_config(self.params).tied

    def open_tokenizer(self, args: ModelArgs, path: str | Path | None = None) -> "Tokenizer":
        """The folder's tokenizer, or the one at `path`, with the folder's end-of-text ids.

        Raises CheckpointError if there is no tokenizer or if it belongs to another model.
        """
        from llama_ref.checkpoint.hf.conventions import end_ids
        from llama_ref.tokenizer import Tokenizer  # slow: `list` needs no tiktoken

        path = path or self.tokenizer
        if path is None:
            raise CheckpointError(self._lacks_tokenizer())
        tokenizer = Tokenizer(path, args.vocab_size)
        if tokenizer.n_words != args.vocab_size:
            raise CheckpointError(
                f"{path} has {tokenizer.n_words:,} tokens, but {self.params.name} of {self.path} says vocab_size "
                f"{args.vocab_size:,}: they belong to different models"
            )
        tokenizer.stop_tokens += [i for i in end_ids(self.path, tokenizer.vocabulary) if i not in tokenizer.stop_tokens]
        return tokenizer

    def _lacks_tokenizer(self) -> str:
        usual = "tokenizer.json" if self.is_hugging_face else "tokenizer.model"
        near = (self.path / "original", self.path.parent, self.path / "tokenizer")
        places = [place / name for place in near for name in ("tokenizer.model", "tokenizer.json")]
        found = next((place for place in places if place.is_file()), None)
        if found:
            return f"{self.path} lacks {usual}, but there is {found}: copy it into the folder, or give it as tokenizer_path"
        return f"{self.path} lacks {with_hint(self.path / usual)}; fetch it, or name one with tokenizer_path"

    @property
    def name(self) -> str:
        return model_name(self.path)

    @property
    def weights(self) -> tuple[Path, ...]:
        """The shards, and in an fp8 release the files with their scales."""
        scales = (self.path / scales_name(rank) for rank in range(len(self.shards)))
        return self.shards + tuple(path for path in scales if path.is_file())

    @property
    def shard_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.weights)


def _read_config(path: Path) -> "HFConfig":
    from llama_ref.checkpoint.hf.config import read_config  # slow: `list` needs no torch

    return read_config(path)


def checkpoints_root() -> Path:
    """Where Meta's downloader puts releases: in ~/.llama, or $LLAMA_MODELS_CONFIG_DIR."""
    return _expanded(os.environ.get("LLAMA_MODELS_CONFIG_DIR") or "~/.llama") / "checkpoints"


def list_folders() -> list[Path]:
    """The folders in `checkpoints_root()`, sorted by name; empty if it does not exist."""
    root = checkpoints_root()
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"cannot list {root}: {error.strerror}") from error


def find_folder(name: str | Path) -> Path:
    """Find a folder by its path or by the name of a release, in any of its spellings.

    A name is looked up in `checkpoints_root()`, first with `-` for `:` as Meta's downloader writes
    it, then in other spellings ("meta-llama/Llama-3.2-1B", "llama3.2-1b"). "owner/name" is also
    looked up in Hugging Face's cache, which gives the repository's snapshot. Raises FolderNotFound
    with similar names and the folders in the root.
    """
    if not str(name):
        raise FolderNotFound(f"the name of the checkpoint is empty.{_what_is_there()}")
    path = _expanded(name)
    try:
        for candidate in _candidates(str(name), path):
            if candidate.is_dir():
                return _snapshot(candidate)
        if path.is_file():
            raise FolderNotFound(f"{path} is a file; give the folder that holds it ({path.parent})")
        raise FolderNotFound(f"no checkpoint at {_searched(str(name), path)}{_guess(str(name), path)}{_what_is_there()}")
    except OSError as error:  # most often: no permission to enter a parent folder
        raise CheckpointError(f"cannot look for {error.filename}: {error.strerror}") from error


def _candidates(name: str, path: Path) -> Iterator[Path]:
    """Where the folder may be, best first."""
    yield path
    yield as_on_disk(path)
    if path.is_absolute():
        return
    yield checkpoints_root() / name.replace(":", "-")
    if "/" not in name.removeprefix(META):
        alike = [folder for folder in list_folders() if name_key(folder.name) == name_key(name)]
        yield from alike[:1] if len(alike) == 1 else []
    if name.count("/") == 1:
        yield _expanded(in_hub_cache(name))


def _searched(name: str, path: Path) -> str:
    return str(path) if path.is_absolute() else f"{path} or {checkpoints_root() / name.replace(':', '-')}"


def _snapshot(path: Path) -> Path:
    """The snapshot in a repository of Hugging Face's cache; any other folder itself."""
    found = snapshots(path)
    if len(found) > 1:
        raise FolderNotFound(f"{path} has {len(found)} snapshots: give the path of one, such as {found[0]}")
    return found[0] if found else path


def _guess(name: str, path: Path) -> str:
    """Folders with similar names: beside a path, in the root for a name."""
    beside = path.parent
    if "/" in name.removeprefix(META) and beside.is_dir():
        near = [str(beside / each) for each in nearest(path.name, [each.name for each in beside.iterdir() if each.is_dir()])]
    else:
        near = nearest(name, [folder.name for folder in list_folders()])
        if not near and name not in RELEASES and (known := nearest(name, list(RELEASES))):
            return f"; did you mean the release {' or '.join(known)}?"
    return f"; did you mean {' or '.join(near)}?" if near else "."


def _expanded(path: str | Path) -> Path:
    """Replace `~` by the home directory, if that is known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _what_is_there() -> str:
    root, folders = checkpoints_root(), list_folders()
    if not folders:
        return f" {root} holds no checkpoints; set LLAMA_MODELS_CONFIG_DIR if yours are elsewhere"
    return f" {root} holds: {', '.join(folder.name for folder in folders)}"


def open_folder(name: str | Path) -> CheckpointFolder:
    """Find a folder by path or name, and its files.

    If a Hugging Face repository holds Meta's files in `original/`, those are opened. If the folder
    is not a checkpoint, raises CheckpointError and says what it holds instead.
    """
    path = find_folder(name)
    try:
        path = native_folder(path)
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise CheckpointError(f"cannot list {path}: {error.strerror}") from error
    shards = [name for name in names if SHARD_NAME.fullmatch(name)]
    safetensors = [name for name in names if SAFETENSORS_NAME.fullmatch(name)]
    if shards and "params.json" in names:
        _check_no_gaps(path, shards)
        shards, params = sorted(shards, key=shard_number), "params.json"
    elif safetensors and ("config.json" in names or says_quantized(path / "params.json") or _is_guard(path, safetensors)):
        _check_one_set(path, safetensors)
        is_own = "config.json" not in names and says_quantized(path / "params.json")
        shards, params = safetensors, "params.json" if is_own else "config.json"
    else:
        raise CheckpointError(_why_no_checkpoint(path, names, shards))
    _check_links(path, shards)
    tokenizers = ("tokenizer.model", "tokenizer.json") if params == "params.json" else ("tokenizer.json", "tokenizer.model")
    return CheckpointFolder(
        path=path,
        params=path / params,
        shards=tuple(path / name for name in shards),
        tokenizer=next((path / name for name in tokenizers if name in names), None),
        checklist=path / "checklist.chk" if "checklist.chk" in names else None,
    )


def native_folder(path: Path) -> Path:
    """The folder with Meta's files, which a Hugging Face repository has in `original/`.

    Llama 3.1 405B's repository has them in `original/mp8` or `original/mp16`. Raises OSError.
    """
    within = [each.parent for pattern in ("original", "original/*") for each in path.glob(f"{pattern}/params.json")]
    if (path / "params.json").exists() or len(within) != 1:
        return path
    [inner] = within
    # Many downloads have the safetensors, but only the small files of `original/`.
    has_shards = any(SHARD_NAME.fullmatch(entry.name) for entry in inner.iterdir())
    has_safetensors = any(SAFETENSORS_NAME.fullmatch(entry.name) for entry in path.iterdir())
    return inner if has_shards or not has_safetensors else path


def shard_name(number: int) -> str:
    """The name of a shard, from its number."""
    return f"consolidated.{number:02d}.pth"


def shard_number(name: str) -> int:
    """The number in a shard's name; -1 for any other file."""
    match = SHARD_NAME.fullmatch(name)
    return int(match[1]) if match else -1


def says_quantized(params: Path) -> bool:
    """Whether params.json names a quantization scheme, which this package adds when quantizing."""
    try:
        return QUANTIZATION in ModelArgs.from_json(params).extra
    except CheckpointError:
        return False


def _is_guard(path: Path, safetensors: list[str]) -> bool:
    """Whether the files are Llama Guard 3 8B's in int8, which has no config.json.

    Broken files are ignored.
    """
    found: dict[str, HeldTensor] = {}
    for name in safetensors:
        with suppress(CheckpointError):
            found |= inspect_safetensors(path / name)
    return is_guard({name: (held.dtype, held.shape) for name, held in found.items() if not is_ignored(name)})


def _check_no_gaps(path: Path, shards: list[str]) -> None:
    numbers = {shard_number(name) for name in shards}
    n_missing = max(numbers) + 1 - len(numbers)
    if n_missing:
        missing = islice((number for number in count() if number not in numbers), min(n_missing, MOST_LISTED + 1))
        names = _listed([with_hint(path / shard_name(number)) for number in missing])
        raise CheckpointError(
            f"{path} has shards up to consolidated.{max(numbers):02d}.pth but lacks {names}; fetch what is missing"
        )


def _check_one_set(path: Path, names: list[str]) -> None:
    """Raise CheckpointError unless safetensors are one model: a single file, or 1 to N of N."""
    if "model.safetensors" in names:
        if len(names) > 1:
            raise CheckpointError(f"{path} holds model.safetensors and {names[0]}: two models; {_which_to_remove(path, names)}")
        return
    totals = {int(match[2]) for name in names if (match := SAFETENSORS_NAME.fullmatch(name))}
    if len(totals) > 1:
        raise CheckpointError(
            f"{path} holds files of {' and of '.join(map(str, sorted(totals)))}: two models; {_which_to_remove(path, names)}"
        )
    total = totals.pop()
    missing = sorted({f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)} - set(names))
    if missing:
        names_and_hints = _listed([with_hint(path / name) for name in missing])
        raise CheckpointError(f"{path} lacks {names_and_hints}; fetch what is missing")


def _which_to_remove(path: Path, names: list[str]) -> str:
    """Advice on which of two models' files to remove: those that the index does not name."""
    try:
        index = read_json(path / INDEX_NAME, INDEX_LIMIT_BYTES, "an index of safetensors")
        named = set(index["weight_map"].values())
        others = [name for name in names if name not in named]
    except (CheckpointError, AttributeError, KeyError, TypeError):
        return "remove one of them"
    if len(others) == len(names) or not others:
        return "remove one of them"
    return f"{INDEX_NAME} names {_listed(sorted(named))}, so remove {_listed(others)} if the index is right"


def _listed(names: list[str]) -> str:
    return comma_list(names, MOST_LISTED)


def _check_links(path: Path, names: list[str]) -> None:
    """Raise CheckpointError for a dangling link: Hugging Face's cache links to blobs."""
    for name in names:
        if not (path / name).exists():
            raise CheckpointError(
                f"{path / name} is a link to {(path / name).readlink()}, which does not exist; fetch it again"
            )


def _why_no_checkpoint(path: Path, names: list[str], shards: list[str]) -> str:
    if not names:
        return f"{path} is empty; fetch params.json, consolidated.00.pth, tokenizer.model and checklist.chk into it"
    suffixes = {Path(name).suffix for name in names}
    if "adapter_config.json" in names:
        return f"{path} holds an adapter (LoRA), not a model; merge it into its base model (peft's merge_and_unload) first"
    if not shards and not any(map(SAFETENSORS_NAME.fullmatch, names)):
        if advice := how_to_rename(path, names):
            return advice
        first_weights = path / ("model.safetensors" if "config.json" in names else shard_name(0))
        if hint_about(first_weights):
            return f"{path} lacks {with_hint(first_weights)}; fetch it"
    if ".safetensors" in suffixes and "config.json" not in names:
        return f"{path} holds safetensors but lacks config.json, which describes the model; fetch it too"
    if "config.json" in names and ".bin" in suffixes and not shards:
        return f"{path} holds its weights as pickles (.bin), which are not read; fetch them as safetensors"
    if "config.json" in names and not shards:
        return f"{path} has config.json but no model.safetensors or model-00001-of-….safetensors; fetch the weights too"
    if ".pte" in suffixes:
        return (
            f"{path} holds an ExecuTorch program (.pte), as Llama Guard 3 1B in int4 is: it runs on ExecuTorch, and PyTorch "
            "cannot read it; fetch Llama-Guard-3-1B, the guard in bf16"
        )
    if ".gguf" in suffixes:
        return f"{path} holds a GGUF file for llama.cpp; fetch Meta's own files of that release"
    if shards:
        lacking = "params.json (it is named `params` here: rename it)" if "params" in names else with_hint(path / "params.json")
        return f"{path} lacks {lacking}; fetch it beside {shards[0]}"
    within = [str(each.parent) for pattern in ("*", "original/*") for each in sorted(path.glob(f"{pattern}/params.json"))]
    if within:
        return f"{path} holds no checkpoint itself, but these folders in it may: give one of {_listed(within)}"
    return f"{path} holds no consolidated.NN.pth and no model.safetensors; it holds {_listed(names)}"
