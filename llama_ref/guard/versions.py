"""The releases of Llama Guard, whose prompts differ, and detection of a checkpoint's release."""

import re
from dataclasses import dataclass
from typing import Literal

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.releases import SHAPES
from llama_ref.checkpoint.spelling import name_key
from llama_ref.errors import RequestError
from llama_ref.guard.categories import GUARD_2, GUARD_3, GUARD_3_8B, Category

VersionName = Literal["2", "3-1B", "3-8B", "3-11B"]

NUMBER = re.compile(r"guard[-_. ]?([23])(?![\d.]*b|\d|\.\d)")
SIZE = re.compile(r"(?<![\d.])(1|8|11)b")


@dataclass(frozen=True)
class Version:
    """The differences of a release's prompt.

    `line_end` ends a category's line, `text_end` is appended to the text of the message.
    """

    name: VersionName
    categories: tuple[Category, ...]
    line_end: str = "."
    text_end: str = ""
    reads_images: bool = False


VERSIONS: dict[VersionName, Version] = {
    version.name: version
    for version in (
        Version("2", GUARD_2, line_end=". "),
        Version("3-1B", GUARD_3, text_end=" "),
        Version("3-8B", GUARD_3_8B),
        Version("3-11B", GUARD_3, text_end=" ", reads_images=True),
    )
}


def version_of(args: ModelArgs, name: str | None = None) -> Version:
    """The version of a guard with this shape and folder name (None: assume it is a guard).

    The name must contain "guard", because chat models have the same shapes. A number and size in
    the name take precedence over the shape. Raises RequestError if the result is ambiguous: Guard 2
    and Guard 3 8B have the same shape.
    """
    key = "guard" if name is None else name_key(name)
    number, written = NUMBER.search(key), SIZE.search(key)
    size = f"{written[1]}B" if written else _size(args)
    if "guard" in key:
        if number and number[1] == "2":
            return VERSIONS["2"]
        if size == "1B":
            return VERSIONS["3-1B"]
        if size == "11B":
            return VERSIONS["3-11B"]
        if size == "8B" and number:
            return VERSIONS["3-8B"]
    which = "the model" if name is None else f"{name!r:.80}"
    why = "may be Guard 2 or Guard 3, both are 8B" if "guard" in key and size == "8B" else "is not a known Llama Guard"
    raise RequestError(
        f"{which} {why}: say which prompt it expects, with --guard_version {'|'.join(VERSIONS)} (in Python: version=)"
    )


def find_version(name: str) -> Version:
    """A version by its name. Raises RequestError."""
    for known, version in VERSIONS.items():
        if name == known:
            return version
    raise RequestError(f"the guard's version is {name!r:.60}, expected one of {', '.join(VERSIONS)}")


def _size(args: ModelArgs) -> str | None:
    """The size of the release with this shape; None if unknown."""
    if args.vision_chunk_size is not None:
        return "11B"
    for size in ("1B", "8B"):
        if (args.dim, args.n_layers) == (SHAPES[size]["dim"], SHAPES[size]["n_layers"]):
            return size
    return None
