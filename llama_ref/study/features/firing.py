"""Find the features of a dictionary that fire at each token of a text."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from llama_ref.model import Transformer
from llama_ref.study.features.active import Active
from llama_ref.study.features.cross_layer import CrossLayerTranscoder, reads_of
from llama_ref.study.features.dictionary import Features
from llama_ref.study.inputs import one_row
from llama_ref.study.trace import trace


@dataclass(frozen=True)
class Firing:
    """A text's ids and the features that fire at them. `name`, `form`, `reads` and `writes` are the dictionary's.

    In `active` a cross-layer transcoder's features are numbered consecutively, layer by layer; `starts` has
    the number of each layer's first feature.
    """

    tokens: list[int]
    active: Active
    name: str
    form: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    starts: tuple[int, ...] = ()

    def place(self, feature: int) -> tuple[int | None, int]:
        """A feature's layer in a cross-layer transcoder (otherwise None), and its number there."""
        if not self.starts:
            return None, feature
        layer = bisect_right(self.starts, feature) - 1
        return layer, feature - self.starts[layer]

    def label(self, feature: int) -> str:
        """A feature's label: "12", or "3:12" for feature 12 of layer 3."""
        layer, number = self.place(feature)
        return f"{number}" if layer is None else f"{layer}:{number}"

    @property
    def legend(self) -> str:
        """An explanation of labels such as 3:12; empty if labels have no layer."""
        return "3:12 is feature 12 of layer 3." if self.starts else ""

    @property
    def where(self) -> str:
        """The activations that are read and written, in words."""
        reads = _span(self.reads)
        return reads if self.writes == self.reads else f"{reads}, which make {_span(self.writes)}"


def firing(model: Transformer, features: Features | CrossLayerTranscoder, tokens: Sequence[int] | Tensor) -> Firing:
    """Run a text's ids, and encode the activations that the features read. Raises RequestError."""
    features.check(model)
    row, reads = one_row(model, tokens), reads_of(features)
    seen = trace(model, row, reads)
    starts: tuple[int, ...] = ()
    if isinstance(features, CrossLayerTranscoder):
        starts = tuple(accumulate(map(len, features.layers[:-1]), initial=0))
        active = Active.together(features.active(seen), starts)
    else:
        active = features.active(seen)
    return Firing(row[0].tolist(), active, features.path.name, features.form, reads, features.writes, starts)


def _span(names: Sequence[str]) -> str:
    """The only name, or the first and the last."""
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
