"""Reports and pictures as files: whole or not at all."""

import os
from collections.abc import Iterable
from pathlib import Path

from llama_ref.checkpoint.formats.atomic import ADVICE_WHEN_FULL, atomic_file
from llama_ref.errors import RequestError


def write_output(path: Path, pieces: Iterable[bytes]) -> None:
    """Write one file, in place of one that is there, and its folder; where a link stands, what it leads to.

    Raises RequestError where it cannot be written.
    """
    path = Path(os.path.realpath(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.writelines(pieces)
    except OSError as error:
        advice = ADVICE_WHEN_FULL.get(error.errno, "choose another folder or name")
        raise RequestError(f"cannot write {path}: {error.strerror or error}; {advice}") from error
