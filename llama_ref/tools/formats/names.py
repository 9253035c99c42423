"""The names of the tool formats, and which one a release was trained on."""

import re
from pathlib import Path
from typing import Literal, get_args

from llama_ref.args import SHAPES_SCALED_BY_32, ModelArgs
from llama_ref.errors import RequestError

ToolFormat = Literal["json", "function_tag", "python_list"]
TOOL_FORMATS: tuple[ToolFormat, ...] = get_args(ToolFormat)

UNTRAINED = (
    "this model was not trained to call tools, as its RoPE is not scaled (Llama 3.0 or another model): tools are "
    "written in Llama 3.1's format, which it may not understand; use Llama 3.1 or later"
)
MINOR_VERSION = re.compile(r"llama-?3[._]([0-3])", re.IGNORECASE)


def check_format(name: str) -> ToolFormat:
    """Check a format's name and return it. Raises RequestError for an unknown one."""
    if name not in TOOL_FORMATS:
        raise RequestError(f"unknown tool_format {name!r}, expected one of {', '.join(TOOL_FORMATS)}")
    return name


def default_format(args: ModelArgs, folder: Path | None = None) -> ToolFormat:
    """The format that Meta documents: python_list for 3.2 1B and 3B and for 3.3, else JSON.

    3.3 70B has the same shape as 3.1 70B: only the folder's name tells them apart.
    """
    if args.has_vision or not args.use_scaled_rope:
        return "json"
    versions = MINOR_VERSION.findall(str(folder)) if folder else []
    is_small = (args.dim, args.n_heads, args.n_kv_heads) in SHAPES_SCALED_BY_32
    return "python_list" if is_small or versions[-1:] == ["3"] else "json"


def untrained(args: ModelArgs) -> str | None:
    """A warning if the model was not trained to call tools; else None."""
    return None if args.use_scaled_rope else UNTRAINED
