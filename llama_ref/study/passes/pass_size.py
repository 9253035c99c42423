"""How many tokens run in one pass: as many as keep the device busy and fit its memory."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch.distributed as dist

from llama_ref.machine.memory import free_bytes
from llama_ref.model import Transformer
from llama_ref.parallel.division import division_of
from llama_ref.study.names import LAYER_AXES, SCORES

PASS_TOKENS = 1024  # maximum for several texts, padding included; on two CPU cores more are not faster
CUDA_PASS_TOKENS = 1 << 15  # small passes leave a GPU idle
EACH_PASS = 32  # fixed cost of a pass (reading the weights), as a number of tokens that takes as long
SHARE = 0.5  # of the free memory that a pass may use


def split_passes(lengths: Sequence[int], most: int | None = None) -> Iterator[range]:
    """Split texts of these lengths, in their order, into the passes that take the least time.

    A pass has at most `most` tokens (default: PASS_TOKENS), padding included, or a single text.
    """
    most = PASS_TOKENS if most is None else most
    times, starts = [0.0], []  # for the first n texts: their time in tokens, and the start of their last pass
    for end in range(1, len(lengths) + 1):
        longest, best = 0, (math.inf, 0)
        for start in range(end - 1, -1, -1):
            longest = max(longest, lengths[start])
            held = (end - start) * longest
            if held > most and start < end - 1:
                break
            best = min(best, (times[start] + EACH_PASS + held, start))
        times.append(best[0])
        starts.append(best[1])
    borders = [len(lengths)]
    while borders[-1]:
        borders.append(starts[borders[-1] - 1])
    return (range(start, end) for end, start in reversed(list(pairwise(borders))))


def tokens_that_fit(model: Transformer, name: str, longest: int, *, gradients: bool = False) -> int:
    """How many tokens fit in a pass that edits or records a layer's activation `name`, in texts of up to `longest`.

    At most PASS_TOKENS on a CPU and CUDA_PASS_TOKENS on CUDA; fewer if they would take more than half
    of the free memory. With `gradients`, the pass keeps the values of all layers. The processes that a
    model is split across get the same number.
    """
    most = CUDA_PASS_TOKENS if model.device.type == "cuda" else PASS_TOKENS
    free = free_bytes(model.device)
    fit = most if free is None else int(SHARE * free / bytes_per_token(model, name, longest, gradients=gradients))
    return max(1, min(most, _least(model, fit)))


def _least(model: Transformer, n_tokens: int) -> int:
    """The least of what fits in the processes that a model is split across; they may share a CPU's memory."""
    if not division_of(model).job.is_parallel:
        return n_tokens
    each = [0] * dist.get_world_size()
    dist.all_gather_object(each, n_tokens)
    return min(each) if model.device.type == "cuda" else min(each) // len(each)


def bytes_per_token(model: Transformer, name: str, longest: int, *, gradients: bool = False) -> int:
    """An upper bound on a pass's peak activation memory per token.

    A layer's norms and rotations are float32, its other activations in the model's dtype. Logits are
    computed only for the last token, in float32, with the copies that a softmax makes.
    """
    args, size = model.args, model.dtype.itemsize
    layer = size * (3 * args.ffn_dim + 5 * args.dim) + 4 * 5 * args.dim
    shown = {"head": args.n_heads, "head_dim": args.head_dim, "dim": args.dim, "ffn_dim": args.ffn_dim, "key_position": longest}
    watched = 1
    for axis in LAYER_AXES[name]:
        watched *= shown.get(axis, 1)
    layer += 4 * 4 * watched
    if gradients and LAYER_AXES[name] != SCORES:
        layer += 4 * args.n_heads * longest  # scores in attention's backward pass without a fused kernel
    logits = 4 * 4 * args.vocab_size // longest
    return layer * (args.n_layers if gradients else 1) + logits
