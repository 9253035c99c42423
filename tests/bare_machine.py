"""A pytest plugin that hides packages which a GPU machine may lack: `-p bare_machine`."""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

LACKING = {
    *("llama_models", "fairscale", "playwright", "ruff", "hypothesis", "fire", "termcolor", "gguf", "scipy", "psutil"),
    *("nbformat", "nbclient", "matplotlib", "fontTools", "transformers", "torchao", "accelerate", "lm_eval", "sklearn"),
}


class BareFinder(PathFinder):
    """Finds installed packages, except the hidden ones."""

    @classmethod
    def find_spec(cls, fullname: str, *args: Any) -> ModuleSpec | None:
        return None if fullname.partition(".")[0] in LACKING else super().find_spec(fullname, *args)


sys.meta_path[sys.meta_path.index(PathFinder)] = BareFinder
