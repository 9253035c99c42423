"""Install compiled forwards on a model's modules, and recognise them there."""

from collections.abc import Callable
from typing import Any

from torch import nn


class CompiledForward:
    """Base class of callables that replace a module's `forward` (or a model's `hidden`)."""

    is_asynchronous = False  # whether it returns before the device is done, so more can be launched


def install(module: nn.Module, **methods: Callable[..., Any]) -> None:
    """Replace methods of this module only: `install(model, forward=…)`."""
    vars(module).update(methods)


def compiled_forward(module: nn.Module) -> CompiledForward | None:
    """The module's compiled forward, if one is installed."""
    forward = vars(module).get("forward")
    return forward if isinstance(forward, CompiledForward) else None
