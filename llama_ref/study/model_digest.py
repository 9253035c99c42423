"""A digest that tells models in memory apart without reading all their weights."""

import hashlib

import torch
import torch.distributed as dist

from llama_ref.formatting import dtype_name
from llama_ref.model import Transformer
from llama_ref.parallel.division import division_of

SAMPLES = 1024  # approximate number of values read from each tensor


def weights_digest(model: Transformer) -> str:
    """A SHA-256 of every weight's name, shape, dtype and some values; equal on every device.

    For a model that is split across processes, it is the digest of all parts.
    """
    own = _digest(model)
    if not division_of(model).job.is_parallel:
        return own
    parts = [own] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _digest(model: Transformer) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {dtype_name(tensor.dtype)}\n".encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)].cpu().contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
