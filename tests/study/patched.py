"""The shape of the model that tests of patching use, and texts for it."""

import torch
from torch import Tensor

from llama_ref.args import ModelArgs

ARGS = ModelArgs.from_dict(
    {"dim": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 60, "multiple_of": 32, "norm_eps": 1e-5}
    | {"rope_theta": 500000.0, "use_scaled_rope": True}
)
RAGGED = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(ARGS.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
