"""How a model is split: the whole model's shape, and the job that holds its parts."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from llama_ref.args import ModelArgs
from llama_ref.model import Transformer
from llama_ref.parallel.job import ALONE, Job
from llama_ref.parallel.pipeline import split_layers
from llama_ref.parallel.tensor import split_matrices


@dataclass(frozen=True)
class Division:
    """How a model is split.

    `args` describe the whole model; `model.args` only the part held here.
    """

    args: ModelArgs
    job: Job = ALONE

    @property
    def first_layer(self) -> int:
        """The first layer of this process's stage."""
        return self.job.share.layers(self.args.n_layers).start

    @property
    def first_cross_layer(self) -> int:
        """The first cross-attention layer of this process's stage."""
        return sum(layer < self.first_layer for layer in self.args.cross_layers)


_divisions: WeakKeyDictionary[Transformer, Division] = WeakKeyDictionary()


def connect(model: Transformer, args: ModelArgs, job: Job) -> None:
    """Connect a process's part of a model to the other processes.

    `args` describe the whole model.
    """
    if job.tensor_group:
        split_matrices(model, job.share, job.tensor_group)
    if job.pipeline_group:
        split_layers(model, job.share, job.pipeline_group)
    if job.is_parallel:
        _divisions[model] = Division(args, job)


def whole_args(model: Transformer) -> ModelArgs:
    """The shape of the whole model; `model.args` count only the layers and key/value heads held here."""
    return division_of(model).args


def division_of(model: Transformer) -> Division:
    """How a model is split: not at all unless `connect` was called for it."""
    return _divisions.get(model) or Division(model.args)
