"""What a model's layers see of real text: how much an error in each column of a matrix counts.

A column's errors are multiplied by that input of the layer. Weighted by the inputs' mean squares, four bits go where they
matter (the diagonal of GPTQ's Hessian, arXiv:2210.17323; AWQ, arXiv:2306.00978, goes by the same observation).
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from llama_ref.model import Transformer

N_TOKENS = 2048  # of the text; twice as many told nothing more
WINDOW_TOKENS = 512


def calibration_text() -> str:
    """English and code that come with every Python: parts of its reference, and a module of its library."""
    import asyncio.base_events
    import inspect
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    prose = "\n\n".join(
        topics[name] for name in ("class", "comparisons", "dynamic-features", "exceptions", "import", "strings")
    )
    return prose[:5_000] + "\n\n" + inspect.getsource(asyncio.base_events)[:5_000]


@torch.inference_mode()
def importances(model: Transformer, tokens: Iterable[int]) -> dict[str, Tensor]:
    """Mean square of every input of the layers' matrices over a text: float32 (in,) by the weight's name."""
    found: dict[str, Tensor] = {}
    n_seen = 0
    layers = [(name, module) for name, module in model.layers.named_modules(prefix="layers") if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(partial(_note, found, f"{name}.weight")) for name, module in layers]
    try:
        for window in torch.tensor(list(tokens), device=model.norm.weight.device).split(WINDOW_TOKENS):
            model.hidden(window[None])
            n_seen += len(window)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: squares / n_seen for name, squares in found.items()}


def _note(found: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple[Tensor]) -> None:
    squares = inputs[0].flatten(0, -2).float().square().sum(0)
    found[name] = found[name] + squares if name in found else squares
