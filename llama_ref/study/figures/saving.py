"""Pictures as files: whole or not at all, and known to be possible before a model is loaded."""

import os
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_ref.errors import RequestError
from llama_ref.pictures import check_matplotlib
from llama_ref.study.figures.fonts import any_weight
from llama_ref.study.report.output import write_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
LONGEST_NAME = 64  # characters: of a picture while it is being written


def check_pictures(folder: str | Path) -> None:
    """Raise RequestError where no picture could go, the folder made first if need be: before a model is loaded."""
    if not isinstance(folder, str | os.PathLike) or not str(folder):
        raise RequestError(f"png is {folder!r:.60}, expected a folder for pictures")
    if Path(folder).suffix.lower() == ".png":
        raise RequestError(f"png is {str(folder)!r}, expected a folder: there are several pictures, which have their own names")
    check_matplotlib()
    try:
        problem = _problem(Path(os.path.realpath(Path(folder).expanduser())))
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte in the name; a home that nobody has
        problem = f"but nothing can be written there: {getattr(error, 'strerror', None) or error}"
    if problem:
        raise RequestError(f"png is {str(folder)!r:.200}, {problem}")


def _problem(folder: Path) -> str | None:
    """What would keep pictures out of it, where no OSError tells."""
    there = next(place for place in (folder, *folder.parents) if _is_there(place))
    if not there.is_dir():
        return "which is a file, expected a folder for pictures"
    for path in (folder / ("x" * LONGEST_NAME), *(there / name for name in folder.relative_to(there).parts)):
        _is_there(path)  # is there room for these names?
    effective = os.access in os.supports_effective_ids
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=effective):
        return f"but nothing may be written into {there}: choose another folder"
    return None


def _is_there(path: Path) -> bool:
    """Unlike Path.exists, with an OSError for what cannot be there."""
    with suppress(FileNotFoundError):
        path.stat()
        return True
    return False


def save(path: str | Path, make: Callable[..., "Figure"], *arguments: Any) -> None:
    """Draw a figure in matplotlib's own style, whatever a matplotlibrc says; a picture that is there is replaced.

    Raises RequestError where it cannot be written.
    """
    from matplotlib import style

    picture = BytesIO()
    with style.context("default"), any_weight():
        make(*arguments).savefig(picture, format="png", dpi=DPI)
    write_output(Path(path).expanduser(), [picture.getvalue()])
