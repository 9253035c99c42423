"""Find a checkpoint folder and say what is in it."""

import os
import re
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

from llama_ref.errors import CheckpointError, FolderNotFound

SHARD_NAME = re.compile(r"consolidated\.([0-9]{2}|[1-9][0-9]{2,})\.pth")
MOST_LISTED = 8  # names in one error


@dataclass(frozen=True)
class CheckpointFolder:
    """The files of one checkpoint. `shards` stand in the order of their numbers; `checklist` is None where none was shipped."""

    path: Path
    params: Path
    shards: tuple[Path, ...]
    tokenizer: Path | None
    checklist: Path | None

    @property
    def name(self) -> str:
        path = self.path.absolute()  # "." has no name of its own
        return path.parent.name if path.name == "original" else path.name

    @property
    def shard_bytes(self) -> int:
        return sum(shard.stat().st_size for shard in self.shards)


def checkpoints_root() -> Path:
    """Where Meta's downloader puts releases: ~/.llama/checkpoints, or under LLAMA_MODELS_CONFIG_DIR where that is set."""
    return _expanded(os.environ.get("LLAMA_MODELS_CONFIG_DIR") or "~/.llama") / "checkpoints"


def list_folders(root: Path | None = None) -> list[Path]:
    """The folders under `root` (default: `checkpoints_root()`), by name; none if there is no such root."""
    root = root or checkpoints_root()
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"cannot list {root}: {error.strerror}") from error


def find_folder(name: str | Path) -> Path:
    """The folder that a path or a release name means.

    A name is looked for under `checkpoints_root()`, with `:` written `-` as Meta's downloader does. Raises FolderNotFound
    that lists what is there.
    """
    if not str(name):
        raise FolderNotFound(f"an empty name is no checkpoint.{_what_is_there()}")
    path = _expanded(name)
    candidates = [path, checkpoints_root() / str(name).replace(":", "-")]
    try:
        for candidate in candidates:
            if candidate.is_dir():
                return candidate
        if path.is_file():
            raise FolderNotFound(f"{path} is a file; give the folder that holds it ({path.parent})")
    except OSError as error:  # above all: a folder on the way may not be entered
        raise CheckpointError(f"cannot look for {error.filename}: {error.strerror}") from error
    raise FolderNotFound(f"there is no folder {path} and no {candidates[1]}.{_what_is_there()}")


def _expanded(path: str | Path) -> Path:
    """With the home directory in place of `~`; as it stands where nobody knows that home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _what_is_there() -> str:
    root, folders = checkpoints_root(), list_folders()
    if not folders:
        return f" {root} holds no checkpoints; set LLAMA_MODELS_CONFIG_DIR if yours lie elsewhere"
    return f" {root} holds: {', '.join(folder.name for folder in folders)}"


def open_folder(name: str | Path) -> CheckpointFolder:
    """Find a folder and its files. Raises CheckpointError when it is not a native checkpoint, saying what it is instead.

    The folder of a Hugging Face repository leads to its `original/`.
    """
    path = find_folder(name)
    try:
        path = native_folder(path)
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise CheckpointError(f"cannot list {path}: {error.strerror}") from error
    shards = [name for name in names if SHARD_NAME.fullmatch(name)]
    if not shards or "params.json" not in names:
        raise CheckpointError(_why_not_native(path, names, shards))
    _refuse_gaps(path, shards)
    _refuse_broken_links(path, shards)
    return CheckpointFolder(
        path=path,
        params=path / "params.json",
        shards=tuple(path / name for name in sorted(shards, key=shard_number)),
        tokenizer=path / "tokenizer.model" if "tokenizer.model" in names else None,
        checklist=path / "checklist.chk" if "checklist.chk" in names else None,
    )


def native_folder(path: Path) -> Path:
    """The folder with Meta's files: a Hugging Face repository keeps them in `original/`. Raises OSError."""
    inner = path / "original"
    return inner if not (path / "params.json").exists() and (inner / "params.json").is_file() else path


def shard_number(name: str) -> int:
    """The number in a shard's name; -1 for any other file."""
    match = SHARD_NAME.fullmatch(name)
    return int(match[1]) if match else -1


def _refuse_gaps(path: Path, shards: list[str]) -> None:
    numbers = {shard_number(name) for name in shards}
    n_missing = max(numbers) + 1 - len(numbers)
    if n_missing:
        missing = islice((number for number in count() if number not in numbers), min(n_missing, MOST_LISTED))
        names = ", ".join(f"consolidated.{number:02d}.pth" for number in missing) + (", …" if n_missing > MOST_LISTED else "")
        raise CheckpointError(
            f"{path} has shards up to consolidated.{max(numbers):02d}.pth but lacks {names}; fetch what is missing"
        )


def _refuse_broken_links(path: Path, names: list[str]) -> None:
    """A Hugging Face cache is made of links, which outlive what they lead to."""
    for name in names:
        if not (path / name).exists():
            raise CheckpointError(f"{path / name} is a link to {(path / name).readlink()}, which is not there; fetch it again")


def _why_not_native(path: Path, names: list[str], shards: list[str]) -> str:
    if not names:
        return f"{path} is empty; fetch params.json, consolidated.00.pth, tokenizer.model and checklist.chk into it"
    suffixes = {Path(name).suffix for name in names}
    if ".safetensors" in suffixes:
        return (
            f"{path} is in Hugging Face's format (config.json and safetensors), which is not read yet; "
            "fetch the repository's original/ folder, which holds Meta's own files"
        )
    if ".pte" in suffixes:
        return f"{path} holds an ExecuTorch program (.pte), not weights; fetch the release's unquantized sibling"
    if ".gguf" in suffixes:
        return f"{path} holds a GGUF file for llama.cpp; fetch Meta's own files of that release"
    if shards:
        hint = " (it is named `params` here: rename it)" if "params" in names else ""
        return f"{path} lacks params.json{hint}; fetch it beside {shards[0]}"
    found = ", ".join(names[:MOST_LISTED]) + (", …" if len(names) > MOST_LISTED else "")
    return f"{path} holds no consolidated.NN.pth; it holds {found}"
