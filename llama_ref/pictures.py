"""What `--png` needs, whichever command draws."""

import importlib
import importlib.util

from llama_ref.errors import RequestError

OTHERWISE = "pip install matplotlib, or leave --png out"


def check_matplotlib() -> None:
    """Raise RequestError where it is not installed or does not work: better before measuring or loading than after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError(f"--png needs matplotlib, which is not installed: {OTHERWISE}")
    try:
        importlib.import_module("matplotlib.figure")
    except Exception as error:  # built for another numpy, say: whatever a broken installation raises
        raise RequestError(f"--png needs matplotlib, which is installed but does not work ({error}): {OTHERWISE}") from error
