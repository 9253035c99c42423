"""The commands, one a file: `llama-ref NAME` runs the function with `@command` in NAME.py.

Nothing else lists them. A file imports what its command needs only when that runs: `--help` and
`list` should not wait for torch.
"""

import importlib
import pkgutil

from llama_ref.cli.flags import Command


def names() -> list[str]:
    """Names of all commands, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Command:
    """Import a command by its name."""
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = (value for value in vars(module).values() if isinstance(value, Command))
    return found
