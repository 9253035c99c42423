"""Pictures as files: whole or not at all, and known to be possible before a model is loaded."""

import importlib.util
import os
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_ref.errors import RequestError
from llama_ref.study.figures.letters import any_weight
from llama_ref.study.output import write_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150


def check_pictures(folder: str | Path) -> None:
    """Make the folder. Raises RequestError where no picture could go there: better before a model is loaded than after."""
    if not isinstance(folder, str | os.PathLike) or not str(folder):
        raise RequestError(f"png is {folder!r:.60}, expected a folder for pictures")
    if Path(folder).suffix.lower() == ".png":
        raise RequestError(f"png is {str(folder)!r}, expected a folder: there are several pictures, which have their own names")
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("--png needs matplotlib, which is not installed: pip install 'llama-ref[study]', or leave --png out")
    try:
        made = Path(folder).expanduser()
        made.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=made):
            pass
    except FileExistsError:
        raise RequestError(f"png is {str(folder)!r}, which is a file, expected a folder for pictures") from None
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte in the name; a home that nobody has
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"png is {str(folder)!r:.200}, but nothing can be written there: {reason}") from None


def save(path: str | Path, make: Callable[..., "Figure"], *arguments: Any) -> None:
    """Draw a figure in matplotlib's own style, whatever a matplotlibrc says; a picture that is there is replaced.

    Raises RequestError where it cannot be written.
    """
    from matplotlib import style

    picture = BytesIO()
    with style.context("default"), any_weight():
        make(*arguments).savefig(picture, format="png", dpi=DPI)
    write_output(Path(path).expanduser(), [picture.getvalue()])
