"""The generators of tools' prompts in llama-stack 0.2.12, without what its package's __init__ imports."""

import enum
import importlib
import importlib.util
import sys
from types import ModuleType


class Words(str, enum.Enum):
    """The one feature of Python 3.11 that it needs."""


if not hasattr(enum, "StrEnum"):
    enum.StrEnum = Words
if "llama_stack" not in sys.modules:
    package = ModuleType("llama_stack")
    package.__path__ = list(importlib.util.find_spec("llama_stack").submodule_search_locations)
    sys.modules["llama_stack"] = package

prompts = importlib.import_module("llama_stack.models.llama.llama3.prompt_templates")
definitions = importlib.import_module("llama_stack.models.llama.datatypes")
