"""Replace modules of a model."""

from torch import nn


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule with this name ("layers.0.attention.wq"), whatever its type."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, module)
