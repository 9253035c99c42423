"""Models of drawn shapes: grouped queries, tied outputs, scaled RoPE, one layer or several."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from llama_ref.model import Transformer
from random_models import grouped_model

FEW = settings(max_examples=10, deadline=None)


def models(least_layers: int = 1) -> st.SearchStrategy[Transformer]:
    """Random models with a vocabulary of 30 tokens."""
    return st.builds(
        grouped_model,
        groups=st.integers(1, 3),
        kv_heads=st.integers(1, 2),
        layers=st.integers(least_layers, 3),
        scaled=st.booleans(),
        tied=st.booleans(),
        seed=st.integers(0, 99),
    )


def ids_of(model: Transformer, length: int, seed: int) -> Tensor:
    """Random ids (1, length) of the model's vocabulary."""
    return torch.randint(model.args.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
