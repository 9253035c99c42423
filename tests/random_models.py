"""Models of random weights, for tests; needs nothing but PyTorch."""

import torch

from llama_ref.args import ModelArgs
from llama_ref.model import Transformer


def random_model(args: ModelArgs, seed: int, *, tied: bool = False) -> Transformer:
    """Ours with random weights of a healthy size; the norms too, so that swapped norms would show."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(args).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    if tied:
        model.output.weight = model.tok_embeddings.weight
    return model
