"""Four bits for a model that reads a text meanwhile: each matrix is rounded to what its layer is given there (gptq.py).

Layer by layer, each on what the rounded ones before it give. At any time one layer is held in float32, with XᵀX of its inputs.
"""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from importlib.resources import files

import torch
from torch import Tensor, nn

from llama_ref.errors import RequestError
from llama_ref.model import Context, Transformer, TransformerBlock
from llama_ref.quantization.apply import replace_module
from llama_ref.quantization.gptq import round_int4
from llama_ref.quantization.linear import Int4Linear
from llama_ref.quantization.scheme import Scheme

N_TOKENS = 8192  # of the text; half as many left a third more divergence
WINDOW_TOKENS = 512
ALIKE = (  # matrices of a layer that are given the same
    ("attention.wq", "attention.wk", "attention.wv"),
    ("attention.wo",),
    ("feed_forward.w1", "feed_forward.w3"),
    ("feed_forward.w2",),
)

Rounded = Callable[[str], object]  # called with each matrix's name ("layers.0.attention.wq") once it is rounded


@torch.inference_mode()
def round_layers(model: Transformer, scheme: Scheme, tokens: Iterable[int], rounded: Rounded | None = None) -> None:
    """Replace the layers' matrices by four-bit ones, in place, as it suits a text.

    Raises RequestError for an empty text, and where the model's numbers leave float32 while it reads.
    """
    windows = _windows(torch.tensor(list(tokens), device=model.norm.weight.device))
    contexts = [Context(model.args, window, None) for window in windows]
    states = [model.tok_embeddings(window).float() for window in windows]  # (1, T, D)
    for index, layer in enumerate(model.layers):
        wide = copy.deepcopy(layer).float()
        for names, hessian in zip(ALIKE, _hessians(wide, index, states, contexts), strict=True):
            where = f"layers.{index}.{names[0]}.weight"
            if not hessian.isfinite().all():
                raise RequestError(f"what {where} is given leaves float32's range: leave calibration out")
            weights = [wide.get_submodule(name).weight for name in names]
            sizes = [len(weight) for weight in weights]
            group = scheme.group_for(where, len(hessian))
            parts = (part.split(sizes) for part in round_int4(torch.cat(weights), hessian, group))
            for name, *own in zip(names, *parts, strict=True):
                matrix = Int4Linear(*own)
                replace_module(layer, name, matrix)
                replace_module(wide, name, matrix)
                if rounded:
                    rounded(f"layers.{index}.{name}")
        states = [wide(x, context, index) for x, context in zip(states, contexts, strict=True)]


def _windows(tokens: Tensor) -> list[Tensor]:
    """Ids (n,) in rows (1, T) that all begin as the text does, with what stands for its beginning."""
    if not len(tokens):
        raise RequestError("the text to calibrate with is empty; give another, or leave calibration out")
    return [torch.cat((tokens[:1], window))[None] for window in tokens[1:].split(WINDOW_TOKENS - 1)]


def _hessians(layer: TransformerBlock, index: int, states: list[Tensor], contexts: list[Context]) -> list[Tensor]:
    """XᵀX of what each of ALIKE is given: float32 (K, K) each."""
    found: dict[str, Tensor] = {}
    firsts = [names[0] for names in ALIKE]
    hooks = [layer.get_submodule(name).register_forward_pre_hook(partial(_note, found, name)) for name in firsts]
    for x, context in zip(states, contexts, strict=True):
        layer(x, context, index)
    for hook in hooks:
        hook.remove()
    return [found[name] for name in firsts]


def _note(found: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple[Tensor]) -> None:
    x = inputs[0].flatten(0, -2)  # (T, K)
    if name in found:
        found[name].addmm_(x.T, x)
    else:
        found[name] = x.T @ x


def calibration_text() -> str:
    """The text that is read unless the caller gives another: calibration.txt, the same on every machine and Python.

    English and Korean prose, code, dialogues, numbers, and some sentences in ten more languages. The kinds alternate, so that
    any prefix of the text is a mixture of them: N_TOKENS ends it earlier with some tokenizers than with others. It was written
    for this project and is under the project's licence (MIT). A change of it changes every int4 folder written afterwards.
    """
    return files("llama_ref.quantization").joinpath("calibration.txt").read_text(encoding="utf-8")
