"""Write reports and pictures atomically."""

import os
from collections.abc import Iterable
from pathlib import Path

from llama_ref.checkpoint.formats.atomic import ADVICE_WHEN_FULL, atomic_file
from llama_ref.errors import RequestError


def write_output(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write or replace one file, creating its folder; follows links.

    Raises RequestError if it cannot be written.
    """
    path = Path(os.path.realpath(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.writelines(pieces)
    except OSError as error:
        advice = ADVICE_WHEN_FULL.get(error.errno or 0, "choose another folder or name")
        raise RequestError(f"cannot write {path}: {error.strerror or error}; {advice}") from error
