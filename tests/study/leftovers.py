"""What interventions could leave behind."""

from llama_ref.model import Transformer


def state_of(model: Transformer) -> list:
    """Everything that a trace could leave behind on a model's modules."""
    return [
        (name, sorted(vars(module)), list(module._forward_hooks), list(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
