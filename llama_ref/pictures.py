"""Check for matplotlib, which `--png` needs in every command that draws."""

import importlib
import importlib.util

from llama_ref.errors import RequestError

OTHERWISE = "pip install matplotlib, or leave --png out"


def check_matplotlib() -> None:
    """Raise RequestError if matplotlib is missing or broken; call it before any long work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError(f"--png needs matplotlib, which is not installed: {OTHERWISE}")
    try:
        importlib.import_module("matplotlib.figure")
    except Exception as error:  # a broken installation may raise anything
        raise RequestError(f"--png needs matplotlib, which is installed but does not work ({error}): {OTHERWISE}") from error
