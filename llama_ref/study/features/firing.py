"""Which features of a dictionary fire at each token of a text."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from llama_ref.model import Transformer
from llama_ref.study.features.active import Active
from llama_ref.study.features.dictionary import Features
from llama_ref.study.inputs import one_row
from llama_ref.study.trace import trace


@dataclass(frozen=True)
class Firing:
    """A text's ids and the features that fire at them. `name`, `form`, `reads` and `writes` are the dictionary's."""

    tokens: list[int]
    active: Active
    name: str
    form: str
    reads: str
    writes: tuple[str, ...]


def firing(model: Transformer, features: Features, tokens: Sequence[int] | Tensor) -> Firing:
    """Run a text's ids, and encode what the features read. Raises RequestError."""
    features.check(model)
    row = one_row(model, tokens)
    active = features.active(trace(model, row, features.reads))
    return Firing(row[0].tolist(), active, features.path.name, features.form, features.reads, features.writes)
