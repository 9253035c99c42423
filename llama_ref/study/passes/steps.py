"""Attention in separate steps: scores, pattern and heads' shares, which the model's fused forward never stores."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llama_ref.parallel.tensor import RowParallelLinear
from llama_ref.quantization.linear import QuantizedMatrix


def attend_in_steps(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, see: Callable[[str, Tensor], Tensor], in_path: bool
) -> Tensor:
    """The model's `out` (B, T, H, hd), replaced where a visitor changed the scores or pattern."""
    T, H, hd = q.shape[1:]
    S, K = k.shape[1:3]
    if visible is None:
        visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()[None]  # (1, T, S)
    hidden = ~visible[:, None]  # (B, 1, T, S)
    grouped = q.float().unflatten(2, (K, H // K))  # (B, T, K, G, hd)
    own = torch.einsum("btkgd,bskd->bkgts", grouped, k.float()).flatten(1, 2)  # (B, H, T, S)
    own = own.mul_(hd**-0.5).masked_fill_(hidden, -torch.inf)
    scores = see("scores", own)
    changed = None
    if scores is not own:
        scores = scores.masked_fill(hidden, -torch.inf)  # an edit must not unmask future tokens
        changed = (scores != own).any(-1)  # (B, H, T)
    own = scores.softmax(-1)
    pattern = see("pattern", own)
    if pattern is not own:
        differs = (pattern != own).any(-1)
        changed = differs if changed is None else changed | differs
    if changed is None and not in_path:
        return out
    mixed = torch.einsum("bkgts,bskd->btkgd", pattern.unflatten(1, (K, -1)), v.float()).flatten(2, 3).type_as(out)
    return _replace(out, mixed, None if changed is None else changed.transpose(1, 2)[..., None], in_path)


def add_by_head(added: Tensor, out: Tensor, wo: nn.Module, see: Callable[[Tensor], Tensor], in_path: bool) -> Tensor:
    """The model's `added` (B, T, D), replaced where a visitor changed a head's share."""
    weight = _matrix(wo)  # (D, H · hd)
    by_head = weight.to(out.dtype).unflatten(1, out.shape[2:])  # (D, H, hd)
    own = torch.einsum("bthe,dhe->bthd", out, by_head)  # (B, T, H, D)
    shares = see(own)
    changed = None if shares is own else (shares != own).flatten(2).any(-1)[..., None]  # (B, T, 1)
    if changed is None and not in_path:
        return added
    total = shares.sum(2)
    if isinstance(wo, RowParallelLinear) and changed is not None:  # other heads are in other processes
        total, changed = wo.summed(total), wo.summed(changed.int()) > 0
    return _replace(added, total, changed, in_path)


def _matrix(linear: nn.Module) -> Tensor:
    """A linear layer's matrix; if it is split across processes, the columns for this process's inputs."""
    if isinstance(linear, RowParallelLinear):
        return linear.part_of(_matrix(linear.linear))
    return linear.dequantize() if isinstance(linear, QuantizedMatrix) else linear.get_parameter("weight")


def _replace(own: Tensor, other: Tensor, changed: Tensor | None, in_path: bool) -> Tensor:
    """`other` where it was changed, else `own`; with `in_path`, gradients flow through `other`."""
    if changed is not None:
        own = torch.where(changed, other, own)
    return own.detach() + (other - other.detach()) if in_path else own
