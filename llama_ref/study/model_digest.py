"""A digest that tells models in memory apart by every bit of their weights, computed on their device."""

import hashlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llama_ref.formatting import dtype_name
from llama_ref.model import Transformer
from llama_ref.parallel.division import division_of

COLUMNS = 1 << 17  # words added at a time: few kernel launches on a GPU, and the sums fit in a CPU's cache
MULTIPLIER = 6364136223846793005  # Knuth's, of linear congruential generators modulo 2^64
CONSTANTS = ("n_heads", "n_kv_heads", "head_dim", "norm_eps", "rope_theta", "rope_scaling_factor")


def weights_digest(model: Transformer) -> str:
    """A SHA-256 of every weight's name, shape, dtype and bits, and of constants; equal on every device.

    For a model that is split across processes, it is the digest of all parts.
    """
    own = _digest(model)
    if not division_of(model).job.is_parallel:
        return own
    parts = [own] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _digest(model: Transformer) -> str:
    args = division_of(model).args
    rounding = [name for name, module in model.named_modules() if getattr(module, "rounds_inputs", False)]
    digest = hashlib.sha256(f"{[getattr(args, name) for name in CONSTANTS]} {rounding}\n".encode())
    sums = torch.zeros(COLUMNS, dtype=torch.int64, device=model.device)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {dtype_name(tensor.dtype)}\n".encode())
        _add(sums, tensor)
    digest.update(sums.cpu().numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


def _add(sums: Tensor, tensor: Tensor) -> None:
    """Add a tensor's bits to int64 sums, on its device, modulo 2^64, which is exact everywhere.

    The bits are 32-bit words in rows as long as `sums`; for each word, its column's sum becomes
    `MULTIPLIER * sum + word`. The multiplier is odd, so one changed word always changes its sum. Each row
    is multiplied by another power of it, so the order of the rows counts. 64-bit words would be faster,
    but two flipped signs, as the highest bits in one column, would cancel.
    """
    for row in _words(tensor).split(len(sums)):
        own = sums[: len(row)]
        torch.add(row, own, alpha=MULTIPLIER, out=own)


def _words(tensor: Tensor) -> Tensor:
    """A tensor's bits as int32, with zeros after the last byte; a view, if its storage allows one."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.numel() % 4 or data.storage_offset() % 4:
        data = F.pad(data, (0, -data.numel() % 4))
    return data.view(torch.int32)
