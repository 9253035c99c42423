"""Explain a file whose tensors do not have the model's names, and say what to do about it."""

from collections.abc import Collection

from llama_ref.checkpoint.hf.names import TEXT_MODEL, hf_name
from llama_ref.checkpoint.shapes import EMBEDDING, is_ignored
from llama_ref.formatting import comma_list

WRAPPERS = {"module.": "DistributedDataParallel", "_orig_mod.": "torch.compile"}
MOST_SHOWN = 3


def foreign_names(found: Collection[str], expected: Collection[str]) -> str | None:
    """The names of a file's tensors and advice, if none of the names is the model's; else None.

    `expected` are Meta's names or Hugging Face's.
    """
    names = [name for name in found if not is_ignored(name)]
    if not names or any(name in expected for name in names):
        return None
    shown = f"{len(names)} tensors have other names, {_shown(names)}, expected {_shown(expected)}"
    return f"{shown}; {_advice(names, expected)}"


def has_meta_names(names: Collection[str]) -> bool:
    """Whether tensors have Meta's names, perhaps after a prefix."""
    return any(name.endswith(EMBEDDING) for name in names)


def has_hf_names(names: Collection[str]) -> bool:
    """Whether tensors have Hugging Face's names, perhaps after a prefix."""
    return any(name.endswith(hf_name(EMBEDDING)) for name in names)


def _advice(names: Collection[str], expected: Collection[str]) -> str:
    held, described = ("vision" if any(TEXT_MODEL in name for name in each) else "text" for each in (names, expected))
    if held != described and has_hf_names(names) and has_hf_names(expected):
        return f"they are a {held} model's, but config.json describes a {described} model: fetch both from one release"
    embedding = next((name for name in expected if name.endswith((EMBEDDING, hf_name(EMBEDDING)))), EMBEDDING)
    wrapped = next((name for name in names if name.endswith(embedding)), None)
    if wrapped is not None:
        prefix = wrapped.removesuffix(embedding)
        origin = " and ".join(f"{wrapper} adds {part!r}" for part, wrapper in WRAPPERS.items() if part in prefix)
        return f"save them again without {prefix!r}" + (f" ({origin})" if origin else "")
    if has_hf_names(names):
        return "they are Hugging Face's names: save them as model.safetensors beside the model's config.json"
    if has_meta_names(names):
        return "they are Meta's names: save them with torch.save as consolidated.00.pth beside the model's params.json"
    return "they belong to another kind of model"


def _shown(names: Collection[str]) -> str:
    return comma_list(list(names), MOST_SHOWN)
