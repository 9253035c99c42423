"""What the compiled decode steps put onto a model, as the rest of the package recognises it."""

from torch import nn


class CompiledForward:
    """Base of the callables that stand in place of a module's `forward` (or a model's `hidden`) and compute the same faster."""

    is_asynchronous = False  # whether it returns before the device is done, so that more may be launched meanwhile


def compiled_forward(module: nn.Module) -> CompiledForward | None:
    """The one that a module has, if it has one."""
    forward = vars(module).get("forward")
    return forward if isinstance(forward, CompiledForward) else None
