"""Shared by `guard` and `chat --guard`: --guard_version, and loading a guard."""

import os
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Literal

from llama_ref.cli.parsing.flags import Flag
from llama_ref.cli.shared.options import Loading, WholeModel, load
from llama_ref.errors import RequestError

if TYPE_CHECKING:
    from llama_ref.checkpoint.folder import CheckpointFolder
    from llama_ref.guard.judge import Guard
    from llama_ref.guard.versions import Version

GuardVersion = Annotated[
    Literal["2", "3-1B", "3-8B", "3-11B"] | None,
    Flag("version of Llama Guard whose prompt to use", unset="detected from the folder's name and shape"),
]


def chosen_version(folder: "CheckpointFolder", given: str | None) -> "Version":
    """Return the given guard version, or detect the folder's. Raises RequestError if unknown."""
    from llama_ref.guard.versions import find_version, version_of

    return version_of(folder.read_args(), folder.name) if given is None else find_version(given)


def load_guard(name: str, given: str | None, loading: Loading) -> "Guard":
    """Load a guard beside another model, with the same options. Raises RequestError under torchrun."""
    from llama_ref.checkpoint.folder import open_folder
    from llama_ref.guard.judge import Guard

    n_processes = os.environ.get("WORLD_SIZE", "1")
    if n_processes != "1":
        raise RequestError(f"{n_processes} processes: --guard works in one process only; start it without torchrun")
    version = chosen_version(open_folder(name), given)
    of_one_folder = ("activations", "tokenizer_path")
    shared = [each.name for each in fields(WholeModel) if each.name not in of_one_folder]
    options = WholeModel(**{option: getattr(loading, option) for option in shared})
    return Guard(load(name, options), version.name)
