"""Tensor parallelism, put onto a model from outside: several processes each hold a part of every matrix.

Each process has some heads, some feed-forward features and some of the vocabulary (checkpoint/slices.py says which). Attention
and feed-forward run as they are on the part at hand; their last matrix gives a share of a sum, which one all-reduce completes.
The embedding looks up what it has and sums likewise; the output gathers everybody's logits. Megatron-LM, arXiv:1909.08053.
"""

import atexit
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ref.checkpoint.slices import Share
from llama_ref.errors import RequestError
from llama_ref.model import Transformer


def join_group(model_parallel_size: int | None, device: torch.device) -> Share:
    """This process's share of the work: as torchrun's environment says; all of it where there is only one process.

    Joins the others (NCCL on CUDA, else Gloo) unless the script already has. Raises RequestError where `model_parallel_size`,
    which Meta's scripts pass, is not the number of processes there are.
    """
    if dist.is_initialized():
        share = Share(dist.get_rank(), dist.get_world_size())
    else:
        share = Share(_number("RANK", 0), _number("WORLD_SIZE", 1))
    if model_parallel_size not in (None, share.world_size):
        raise RequestError(
            f"model_parallel_size is {model_parallel_size}, but there is {share.world_size} process(es): start as many with "
            f"torchrun --nproc_per_node {model_parallel_size}, or leave it out"
        )
    if share.world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave_group)
    return share


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdigit():
        raise RequestError(f"the environment says {name}={value}, expected a number; start with torchrun, or unset it")
    return int(value)


def lost_a_process(error: RuntimeError) -> bool:
    """Whether this is how a collective call says that another process has gone away."""
    signs = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "remote process exited")
    return dist.is_initialized() and any(sign in str(error) for sign in signs)


def end_process(code: int) -> None:
    """End one of several processes here and now; does nothing where there is only one.

    An interpreter that shuts down in its own time now and then aborts in Gloo's threads ("terminate called without an active
    exception"), which torchrun takes for a failed job. All wait for the slowest first, unless this one failed.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if code == 0:
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def parallelize(model: Transformer, share: Share) -> Transformer:
    """Make a model that holds one `share` of every matrix compute what the whole one would; changed in place.

    Every process must call it and every forward pass with the same tokens. Logits are the same, to the bit, on all of them.
    """
    if share.world_size == 1:
        return model
    vocabulary = share.of(model.args.vocab_size)
    for layer in model.layers:
        layer.attention.wo = SummedLinear(layer.attention.wo.weight)
        layer.feed_forward.w2 = SummedLinear(layer.feed_forward.w2.weight)
    model.tok_embeddings = SplitEmbedding(model.tok_embeddings.weight, vocabulary)
    model.output = GatheredLinear(model.output.weight, model.args.vocab_size, share.world_size)
    return model


def is_parallel(model: Transformer) -> bool:
    """Whether `parallelize` has been at it."""
    return isinstance(model.output, GatheredLinear)


def agreeing(sample: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A sampler whose choice is the first process's on all of them: no rounding can make texts part."""

    def agreed(logits: Tensor) -> Tensor:
        chosen = sample(logits)
        dist.broadcast(chosen, src=0)
        return chosen

    return agreed


class SummedLinear(nn.Module):
    """A matrix cut by columns: each process multiplies its features, and the products are summed over all."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight  # (out, in / W)

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight)
        dist.all_reduce(out)
        return out


class SplitEmbedding(nn.Module):
    """An embedding cut by rows: tokens of other processes are zero here, and the sum over all has each token once."""

    def __init__(self, weight: nn.Parameter, vocabulary: range):
        super().__init__()
        self.weight = weight  # (V / W, D)
        self.vocabulary = vocabulary

    def forward(self, tokens: Tensor) -> Tensor:
        elsewhere = (tokens < self.vocabulary.start) | (tokens >= self.vocabulary.stop)
        local = (tokens - self.vocabulary.start).masked_fill(elsewhere, 0)
        out = F.embedding(local, self.weight).masked_fill(elsewhere[..., None], 0)
        dist.all_reduce(out)
        return out


class GatheredLinear(nn.Module):
    """A matrix cut by rows, whose outputs are put together on every process."""

    def __init__(self, weight: nn.Parameter, n_outputs: int, world_size: int):
        super().__init__()
        self.weight = weight  # (V / W, D)
        self.sizes = [len(Share(rank, world_size).of(n_outputs)) for rank in range(world_size)]

    def forward(self, x: Tensor) -> Tensor:
        local = F.linear(x, self.weight)  # (…, V / W)
        local = F.pad(local, (0, max(self.sizes) - local.shape[-1]))  # all parts must be equally long on the way
        parts = [torch.empty_like(local) for _ in self.sizes]
        dist.all_gather(parts, local)
        return torch.cat([part[..., :size] for part, size in zip(parts, self.sizes, strict=True)], dim=-1)
