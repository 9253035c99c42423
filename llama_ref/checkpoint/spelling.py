"""The spellings of a checkpoint's name: Meta's, Hugging Face's, its cache's, NFC and NFD."""

import difflib
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

META = "meta-llama/"  # Meta's releases on Hugging Face
CACHED = "models--"  # a repository in Hugging Face's cache: models--owner--name/snapshots/REVISION


def name_key(name: str) -> str:
    """A key that is the same for all spellings of a model's name.

    "meta-llama/Meta-Llama-3.1-8B", "Llama3.1-8B" and "llama-3.1-8b" have the same key.
    """
    last = unicodedata.normalize("NFC", name).rstrip("/").rpartition("/")[2]
    return last.casefold().removeprefix("meta-").replace(":", "-").replace("llama-3", "llama3")


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The known names most like this one, at most three."""
    by_key: dict[str, str] = {name_key(each): each for each in known}
    return [by_key[key] for key in difflib.get_close_matches(name_key(name), by_key, 3, cutoff=0.6)]


def as_on_disk(path: Path) -> Path:
    """The path with names in the Unicode form on disk: macOS and archives write Korean as NFD."""
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        found = next((found / form for form in forms if (found / form).exists()), found / part)
    return found


def in_hub_cache(name: str) -> Path:
    """Where Hugging Face's cache would keep the repository "owner/name"."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    hub = os.environ.get("HF_HUB_CACHE") or home / "hub"
    return Path(hub) / f"{CACHED}{name.replace('/', '--')}"


def snapshots(path: Path) -> list[Path]:
    """The snapshots of a repository in Hugging Face's cache; only the main branch's if any."""
    if not path.name.startswith(CACHED) or not (path / "snapshots").is_dir():
        return []
    main = path / "refs" / "main"
    current = path / "snapshots" / main.read_text(encoding="utf-8").strip() if main.is_file() else None
    if current and current.is_dir():
        return [current]
    return sorted(each for each in (path / "snapshots").iterdir() if each.is_dir())


def model_name(path: Path) -> str:
    """A folder's name; the repository's for `original/`, `original/mp16` and a cache's snapshot."""
    path = path.absolute()  # Path(".").name is empty
    if "original" in (path.name, path.parent.name):
        path = path.parent if path.name == "original" else path.parent.parent
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith(CACHED):
        return path.parent.parent.name.rpartition("--")[2]
    return path.name
