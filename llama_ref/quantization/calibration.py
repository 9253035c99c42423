"""Int4 rounding calibrated on a text: each matrix is rounded for its inputs there (gptq.py).

Layers are rounded in order, each on the outputs of the rounded layers before it. One layer at a
time is held in float32, with XᵀX of its inputs.
"""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from importlib.resources import files

import torch
from torch import Tensor, nn

from llama_ref.errors import RequestError
from llama_ref.model import Context, Transformer, TransformerBlock
from llama_ref.modules import replace_module
from llama_ref.quantization.gptq import round_int4
from llama_ref.quantization.linear import Int4Linear
from llama_ref.quantization.scheme import Scheme

N_TOKENS = 8192  # with half as many, KL divergence was a third larger
WINDOW_TOKENS = 512
SAME_INPUT = (  # matrices of a layer that share their input
    ("attention.wq", "attention.wk", "attention.wv"),
    ("attention.wo",),
    ("feed_forward.w1", "feed_forward.w3"),
    ("feed_forward.w2",),
)

OnRounded = Callable[[str], object]  # called with the name of each rounded matrix ("layers.0.attention.wq")


@torch.inference_mode()
def round_layers(model: Transformer, scheme: Scheme, tokens: Iterable[int], on_rounded: OnRounded | None = None) -> None:
    """Quantize the layers' matrices to int4, in place, calibrated on a text.

    Raises RequestError for an empty text, and if activations overflow float32.
    """
    windows = _windows(torch.tensor(list(tokens), device=model.device))
    contexts = [Context(model.args, window, None) for window in windows]
    states = [model.tok_embeddings(window).float() for window in windows]  # (1, T, D)
    for index, layer in enumerate(model.layers):
        wide = copy.deepcopy(layer).float()
        for names, hessian in zip(SAME_INPUT, _hessians(wide, index, states, contexts), strict=True):
            where = f"layers.{index}.{names[0]}.weight"
            if not hessian.isfinite().all():
                raise RequestError(f"the inputs of {where} overflow float32: leave calibration out")
            weights = [wide.get_parameter(f"{name}.weight").data for name in names]
            sizes = [len(weight) for weight in weights]
            group = scheme.group_for(where, len(hessian))
            parts = (part.split(sizes) for part in round_int4(torch.cat(weights), hessian, group))
            for name, *own in zip(names, *parts, strict=True):
                matrix = Int4Linear(*own)
                replace_module(layer, name, matrix)
                replace_module(wide, name, matrix)
                if on_rounded:
                    on_rounded(f"layers.{index}.{name}")
        states = [wide(x, context, index) for x, context in zip(states, contexts, strict=True)]


def _windows(tokens: Tensor) -> list[Tensor]:
    """Cut ids (n,) into windows (1, T), each preceded by the text's first token (begin-of-text)."""
    if not len(tokens):
        raise RequestError("the calibration text is empty; give another, or leave calibration out")
    return [torch.cat((tokens[:1], window))[None] for window in tokens[1:].split(WINDOW_TOKENS - 1)]


def _hessians(layer: TransformerBlock, index: int, states: list[Tensor], contexts: list[Context]) -> list[Tensor]:
    """XᵀX of the input of each entry of SAME_INPUT: float32 (K, K) each."""
    found: dict[str, Tensor] = {}
    firsts = [names[0] for names in SAME_INPUT]
    hooks = [layer.get_submodule(name).register_forward_pre_hook(partial(_accumulate, found, name)) for name in firsts]
    for x, context in zip(states, contexts, strict=True):
        layer(x, context, index)
    for hook in hooks:
        hook.remove()
    return [found[name] for name in firsts]


def _accumulate(found: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple[Tensor]) -> None:
    x = inputs[0].flatten(0, -2)  # (T, K)
    if name in found:
        found[name].addmm_(x.T, x)
    else:
        found[name] = x.T @ x


def calibration_text() -> str:
    """The default calibration text, calibration.txt: the same on every machine and Python.

    English and Korean prose, code, dialogues, numbers, and some sentences in ten more languages.
    The kinds alternate, so that any prefix is a mixture of them, because how much of the text
    N_TOKENS covers depends on the tokenizer. It was written for this project, under its licence
    (MIT). Changing it changes every int4 folder written afterwards.
    """
    return files("llama_ref.quantization").joinpath("calibration.txt").read_text(encoding="utf-8")
