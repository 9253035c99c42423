"""One file per command: `llama-ref NAME` runs the function decorated with `@command` in NAME.py.

There is no other list of commands. The functions import what they need when they run: `--help` and
`list` should not wait for torch.
"""

import importlib
import pkgutil

from llama_ref.cli.parsing.flags import Command


def names() -> list[str]:
    """Names of all commands, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Command:
    """Import a command by its name."""
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = (value for value in vars(module).values() if isinstance(value, Command))
    return found
