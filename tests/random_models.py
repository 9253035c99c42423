"""Models with random weights, for tests; imports nothing but PyTorch."""

import torch
from torch import nn

from llama_ref.args import ModelArgs
from llama_ref.model import Transformer
from llama_ref.modules import replace_module
from llama_ref.quantization.linear import Int4Linear
from llama_ref.quantization.meta_int4 import LowRank, MetaInt4Linear
from llama_ref.quantization.rounding import pack
from llama_ref.vision import VisionTransformer


def random_model(args: ModelArgs, seed: int, *, tied: bool = False) -> Transformer:
    """Our model with random weights of realistic size; norms too, so that swapped norms show."""
    generator = torch.Generator().manual_seed(seed)
    model = (VisionTransformer if args.has_vision else Transformer)(args).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    if tied:
        model.output.weight = model.tok_embeddings.weight
    return model


def grouped_model(
    groups: int = 2,
    kv_heads: int = 2,
    layers: int = 2,
    *,
    scaled: bool = True,
    tied: bool = False,
    seed: int = 0,
    vocab_size: int = 30,
    rope_theta: float = 500000.0,
) -> Transformer:
    """A random model with heads of 8 dimensions, in groups of this size; `scaled` is RoPE's."""
    heads = groups * kv_heads
    args = ModelArgs.from_dict(
        {"dim": 8 * heads, "n_layers": layers, "n_heads": heads, "n_kv_heads": kv_heads, "vocab_size": vocab_size}
        | {"multiple_of": 16, "norm_eps": 1e-5, "rope_theta": rope_theta, "use_scaled_rope": scaled}
    )
    return random_model(args, seed=seed, tied=tied)


def as_int4_release(model: Transformer, *, rotates: bool = False, rank: int = 0, rounds_inputs: bool = True) -> None:
    """Turn the layers' matrices into Meta's int4, in groups of 32; adaptors are always the same."""
    generator = torch.Generator().manual_seed(0)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "output"]
    for name in names:
        weight = model.get_parameter(f"{name}.weight")
        groups = weight.float().unflatten(1, (-1, 32))
        scale = groups.abs().amax(-1) / 7
        matrix = Int4Linear(pack(((groups / scale[..., None]).round() + 8).to(torch.uint8)), scale)
        adaptor = None
        if rank:
            shapes = (rank, weight.shape[1]), (weight.shape[0], rank)
            a, b = (torch.randn(shape, generator=generator) * 0.1 for shape in shapes)
            adaptor = LowRank(a.to(weight.dtype), b.to(weight.dtype), 2.0)
        rotated = rotates and name.endswith("w2")
        release = MetaInt4Linear(matrix, rounds_inputs=rounds_inputs, rotates_inputs=rotated, adaptor=adaptor)
        replace_module(model, name, release)
