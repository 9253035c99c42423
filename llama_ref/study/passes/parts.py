"""Gather the activations of a model that is split across processes, so that every visitor gets whole values.

A process has some heads, key/value heads and feed-forward features of every layer of its stage.
They are gathered as soon as they are computed. Editors change the whole value, and each process goes on
with its own part of the result. Recorders get values of other pipeline stages after the pass, when no
stage waits for another.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from llama_ref.errors import RequestError
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
        self._failure: Exception | None = None  # of an edit in this process

    def begin(self, tokens: Tensor, names: Sequence[str]) -> None:
        """Start a pass. Raises JobError unless all processes run the same ids and want the same names."""
        self._kept, self._failure = {}, None
        ids = digest(tokens.cpu().numpy().tobytes())
        facts = {"the tokens": f"{tuple(tokens.shape)} (digest {ids})", "the names of activations": ", ".join(names)}
        self.job.check_same("a pass that is studied", facts)

    def show(self, name: str, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield a whole value that was just computed; nothing if it has to wait for the end of the pass."""
        if self.job.pipeline_group is None or is_of_an_image(name):
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

    def whole(self, name: str, value: Tensor) -> Tensor:
        """A value with the heads or features of all processes."""
        group, dim = self.job.tensor_group, _split_dim(name)
        if group is None or dim is None:
            return value
        if is_of_key_heads(name):
            return self._all_key_heads(value, dim, group)
        return gathered(value, part_sizes(self._total(name), group), group, dim)

    @contextmanager
    def failing_later(self) -> Iterator[None]:
        """Keep an edit's error until `fail_together`: the other processes and stages wait for this one in the pass."""
        try:
            yield
        except Exception as error:
            self._failure = self._failure or error

    def fail_together(self) -> None:
        """Raise the error of an edit: this process's own, or RequestError for another's. All processes call this."""
        own, self._failure = self._failure, None
        messages: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, None if own is None else f"{type(own).__name__}: {own}")
        if own is not None:
            raise own
        for rank, message in enumerate(messages):
            if message is not None:
                raise RequestError(f"an edit failed in process {rank}: {message}")

    def agreed(self, edited: Tensor, *, by_all_stages: bool = False) -> Tensor:
        """The first process's edited value, of a stage or of all: an edit may be random."""
        group = dist.group.WORLD if by_all_stages else self.job.tensor_group
        if group is None:
            return edited
        edited = edited.clone(memory_format=torch.contiguous_format)  # the caller may keep the tensor that an edit returns
        dist.broadcast(edited, group=group, group_src=0)
        return edited

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a whole value."""
        dim, share = _split_dim(name), self.job.share
        if self.job.tensor_group is None or dim is None:
            return whole
        own = kv_heads(self.args, share) if is_of_key_heads(name) else share.slice_of(self._total(name))
        return whole.index_select(dim, torch.tensor(own, device=whole.device))  # kv_heads may name one more than once

    def _total(self, name: str) -> int:
        """The number of query heads or features in a whole value that is split along them."""
        return self.args.n_heads if "head" in axes(name) else self.args.ffn_dim

    def _all_key_heads(self, value: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        """Each key/value head once: several processes may hold the same."""
        held = [kv_heads(self.args, Share(rank, group.size())) for rank in range(group.size())]
        joined = gathered(value, list(map(len, held)), group, dim)
        heads = [head for own in held for head in own]
        first = [heads.index(head) for head in range(self.args.n_kv_heads)]
        return joined if len(first) == len(heads) else joined.index_select(dim, torch.tensor(first, device=joined.device))


def _split_dim(name: str) -> int | None:
    """The dimension along which processes split an activation, counted from the end; None if each has the whole."""
    if is_of_an_image(name):  # every process has the whole encoder
        return None
    own_axes = axes(name)
    return next((i - len(own_axes) for i, axis in enumerate(own_axes) if axis in ("head", "ffn_dim")), None)
