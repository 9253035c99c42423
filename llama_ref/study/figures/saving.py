"""Write pictures atomically, and check before a model is loaded that they can be written."""

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
LONGEST_NAME = 64  # characters of a picture's temporary name


def check_pictures(folder: str | Path) -> None:
    """Raise RequestError if pictures cannot be drawn or written into a folder."""
    check_folder(folder)
    check_matplotlib()


def check_folder(folder: str | Path) -> None:
    """Raise RequestError if nothing can be written into a folder, which need not exist yet."""
    if not isinstance(folder, str | os.PathLike) or not str(folder):
        raise RequestError(f"png is {folder!r:.60}, expected a folder for pictures")
    if Path(folder).suffix.lower() == ".png":
        raise RequestError(f"png is {str(folder)!r}, expected a folder: there are several pictures, which have their own names")
    try:
        problem = _problem(Path(os.path.realpath(Path(folder).expanduser())))
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a NUL byte; RuntimeError: an unknown home directory
        problem = f"but nothing can be written there: {getattr(error, 'strerror', None) or error}"
    if problem:
        raise RequestError(f"png is {str(folder)!r:.200}, {problem}")


def _problem(folder: Path) -> str | None:
    """Why pictures cannot be written into a folder, or None; raises OSError for some reasons."""
    parent = next(path for path in (folder, *folder.parents) if _exists(path))
    if not parent.is_dir():
        return "which is a file, expected a folder for pictures"
    for path in (folder / ("x" * LONGEST_NAME), *(parent / name for name in folder.relative_to(parent).parts)):
        _exists(path)  # raises if a name is too long
    effective = os.access in os.supports_effective_ids
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=effective):
        return f"but {parent} is not writable: choose another folder"
    return None


def _exists(path: Path) -> bool:
    """Like Path.exists, but raises OSError for a path that cannot exist."""
    with suppress(FileNotFoundError):
        path.stat()
        return True
    return False


def save(path: str | Path, make: Callable[..., "Figure"], *arguments: Any) -> None:
    """Draw a figure in matplotlib's default style and write or replace a file.

    Raises RequestError if it cannot be written.
    """
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    picture = BytesIO()
    with style.context("default"), any_weight():
        figure = make(*arguments)
        figure.set_dpi(DPI)
        FigureCanvasAgg(figure).print_png(picture)  # savefig would draw everything twice: for the layout, and to write it
    write_output(Path(path).expanduser(), [picture.getvalue()])
