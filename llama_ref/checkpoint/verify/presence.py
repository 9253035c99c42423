"""Which of a checkpoint's files exist in a folder, without opening them."""

import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from llama_ref.checkpoint.advice.missing_file import hint_about
from llama_ref.checkpoint.folder import SAFETENSORS_NAME, SHARD_NAME
from llama_ref.checkpoint.meta_quantized.kinds import scales_number
from llama_ref.checkpoint.verify.report import FileReport, State
from llama_ref.files import is_link_loop
from llama_ref.vocabulary import ADDED_TOKENS

ONE_FILE = "model.safetensors"
INDEX_NAME = f"{ONE_FILE}.index.json"
PREPROCESSOR_CONFIG = "preprocessor_config.json"  # of a vision model


@dataclass(frozen=True)
class Format:
    """A checkpoint format: the names of its files.

    The first existing file of `tokenizers` is used. `others` are optional files.
    """

    whose: str
    params: str
    tokenizers: tuple[str, str]
    weights: re.Pattern[str]
    first_weights: str
    others: tuple[str, ...]


META = Format(
    whose="Meta's",
    params="params.json",
    tokenizers=("tokenizer.model", "tokenizer.json"),
    weights=SHARD_NAME,
    first_weights="consolidated.00.pth",
    others=(ADDED_TOKENS, "generation_config.json", "chat_template.jinja"),
)
HUGGING_FACE = Format(
    whose="Hugging Face's",
    params="config.json",
    tokenizers=("tokenizer.json", "tokenizer.model"),
    weights=SAFETENSORS_NAME,
    first_weights=ONE_FILE,
    others=(
        INDEX_NAME,
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        ADDED_TOKENS,
        "chat_template.json",
        "chat_template.jinja",
        PREPROCESSOR_CONFIG,
        "processor_config.json",
    ),
)


def format_of(names: Collection[str]) -> Format:
    """The format of these files: the complete one (Meta's first), else the one with some files."""
    for form in (META, HUGGING_FACE):
        if form.params in names and has_weights(form, names):
            return form
    if META.params in names or has_weights(META, names):
        return META
    if HUGGING_FACE.params in names or INDEX_NAME in names or has_weights(HUGGING_FACE, names):
        return HUGGING_FACE
    return HUGGING_FACE if "tokenizer.json" in names and "tokenizer.model" not in names else META


def has_weights(form: Format, names: Collection[str]) -> bool:
    """Whether `names` has weight files of this format."""
    return any(form.weights.fullmatch(name) for name in names)


def names_in(folder: Path) -> list[str]:
    """Sorted names in a folder; empty if it cannot be listed."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []


def checkpoint_files(folder: Path) -> list[str]:
    """Names of the checkpoint's existing files, weights first; empty if it cannot be listed."""
    names = names_in(folder)
    return files_of(format_of(names), names)


def files_of(form: Format, names: Collection[str]) -> list[str]:
    """The names that belong to a checkpoint of this format, weights first."""
    tokenizers = [name for name in form.tokenizers if name in names]
    if form is META:
        tokenizers = tokenizers[:1]
    # In Meta's format, added_tokens.json only belongs to a tokenizer.model. Beside a config.json, the
    # others may belong to the other format.
    others = [name for name in form.others if name in names]
    if form is META and tokenizers != ["tokenizer.model"]:
        others = []
    elif form is META and HUGGING_FACE.params in names:
        others = [name for name in others if name == ADDED_TOKENS]
    weights = [name for name in names if form.weights.fullmatch(name) or (form is META and scales_number(name) >= 0)]
    return [*weights, *(name for name in (form.params,) if name in names), *tokenizers, *others]


def cannot_be_opened(folder: Path, name: str) -> FileReport | None:
    """A report for a file that must not be opened: missing, not a file, or outside the folder."""
    path = folder / name
    try:
        if is_link_loop(path):
            return FileReport(name, State.UNREADABLE, detail="a link that leads back to itself")
        if target := _outside(folder, path):
            return FileReport(name, State.REFUSED, detail=f"a link leads out of the folder, to {target}")
        if not path.exists():
            return FileReport(name, State.MISSING, detail=hint_about(path))
        if not path.is_file():
            detail = "not a plain file: it is a folder, a device or a pipe"
            return FileReport(name, State.UNREADABLE, detail=detail)
    except OSError as error:
        return FileReport(name, State.UNREADABLE, detail=error.strerror or str(error))
    return None


def _outside(folder: Path, path: Path) -> Path | None:
    """The target of `path`, links resolved, if it is outside the folder."""
    target, home = path.resolve(), folder.resolve()
    return None if target.is_relative_to(home) or _is_own_blob(home, target) else target


def _is_own_blob(folder: Path, target: Path) -> bool:
    """Whether the link is one of Hugging Face's cache, from `snapshots/<revision>/` to `blobs/`."""
    return any(parent.name == "snapshots" and target.parent == parent.parent / "blobs" for parent in folder.parents)


def size_of(path: Path) -> int | None:
    """Size in bytes; None if there is no such file."""
    stamp = stamp_of(path)
    return stamp[0] if stamp else None


def stamp_of(path: Path) -> tuple[int, int] | None:
    """(bytes, modification time in ns), which shows whether the content may have changed."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def age_seconds(path: Path) -> float:
    """Seconds since the last modification; infinite if there is no such file."""
    stamp = stamp_of(path)
    return time.time() - stamp[1] / 1e9 if stamp else float("inf")
