"""Gather the activations of a model that is split across processes, so that every visitor gets whole values.

A process has some heads, key/value heads and feed-forward features of every layer of its stage.
They are gathered as soon as they are computed. Values of other pipeline stages are exchanged after the
pass, when no stage waits for another.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from llama_ref.model import Transformer
from llama_ref.parallel.agreement import digest
from llama_ref.parallel.division import division_of
from llama_ref.parallel.sharding import Share, kv_heads
from llama_ref.parallel.tensor import gathered, part_sizes
from llama_ref.study.names import axes, is_of_an_image, is_of_key_heads


class Parts:
    """This process's part of a model; gathers its activations with those of the other processes."""

    def __init__(self, model: Transformer):
        self.division = division_of(model)
        self.args, self.job = self.division.args, self.division.job
        self.device = model.device
        self._kept: dict[str, Tensor] = {}  # this stage's values of the pass

    def begin(self, tokens: Tensor, names: Sequence[str]) -> None:
        """Start a pass. Raises JobError unless all processes run the same ids and want the same names."""
        self._kept = {}
        ids = digest(tokens.cpu().numpy().tobytes())
        facts = {"the tokens": f"{tuple(tokens.shape)} (digest {ids})", "the names of activations": ", ".join(names)}
        self.job.check_same("a pass that is studied", facts)

    def show(self, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield a value that was just computed, whole; nothing if it has to wait for the end of the pass."""
        if is_of_an_image(name):  # every process has the whole encoder
            yield name, value
            return
        whole = self._whole(name, value)
        if self.job.pipeline_group is None:
            yield name, whole
        else:
            self._kept[name] = whole

    def end(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the values that had to wait, of all stages, in the model's order."""
        group = self.job.pipeline_group
        if group is None:
            return
        own, self._kept = self._kept, {}
        announced: list[list] = [[]] * group.size()
        dist.all_gather_object(announced, [(name, value.shape, value.dtype) for name, value in own.items()], group=group)
        for stage, values in enumerate(announced):
            is_own = stage == group.rank()
            for name, shape, dtype in values:
                value = own.pop(name).contiguous() if is_own else torch.empty(shape, dtype=dtype, device=self.device)
                dist.broadcast(value, group=group, group_src=stage)
                yield name, value

    def _whole(self, name: str, value: Tensor) -> Tensor:
        """A value with the heads or features of all processes."""
        group, own_axes = self.job.tensor_group, axes(name)
        if group is None:
            return value
        if is_of_key_heads(name):
            return self._all_key_heads(value, own_axes.index("head") - len(own_axes), group)
        for axis, total in (("head", self.args.n_heads), ("ffn_dim", self.args.ffn_dim)):
            if axis in own_axes:
                return gathered(value, part_sizes(total, group), group, own_axes.index(axis) - len(own_axes))
        return value

    def _all_key_heads(self, value: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        """Each key/value head once: several processes may hold the same."""
        held = [kv_heads(self.args, Share(rank, group.size())) for rank in range(group.size())]
        joined = gathered(value, list(map(len, held)), group, dim)
        heads = [head for own in held for head in own]
        first = [heads.index(head) for head in range(self.args.n_kv_heads)]
        return joined if len(first) == len(heads) else joined.index_select(dim, torch.tensor(first, device=joined.device))
