"""Print by how many megabytes a process grows while it reads a lens at all points; run separately to measure the peak."""

import resource

import torch

from llama_ref.args import ModelArgs
from llama_ref.study.analyses.logit_lens import logit_lens
from random_models import random_model

PARAMS = {"dim": 16, "n_layers": 12, "n_heads": 2, "vocab_size": 40000, "multiple_of": 32, "norm_eps": 1e-5, "rope_theta": 1e4}
TOKENS = list(range(300))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


torch.set_num_threads(1)
model = random_model(ModelArgs.from_dict(PARAMS), seed=0)
logit_lens(model, TOKENS, points=["embedding"])
before = peak()
logit_lens(model, TOKENS)
print(peak() - before)
