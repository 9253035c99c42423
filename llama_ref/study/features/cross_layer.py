"""All layers of a cross-layer transcoder: features that together reconstruct the outputs of all feed-forwards.

f_l = activation(x_l W_enc_lᵀ + b_enc_l)
y_l = Σ_{i ≤ l} f_i W_dec_i[:, l − i] + b_dec_l
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.study.features.active import Active
from llama_ref.study.features.dictionary import Features
from llama_ref.study.passes.hooks import check_model
from llama_ref.study.trace import Trace


def reads_of(features: "Features | CrossLayerTranscoder") -> tuple[str, ...]:
    """Names of the activations that a dictionary reads."""
    return features.reads if isinstance(features, CrossLayerTranscoder) else (features.reads,)


class CrossLayerTranscoder:
    """Features of all L layers of a model; a layer's features write to it and to all later layers.

    `layers` has each layer's Features, which can be edited like any others. `biases` has each layer's
    output bias (D,), or None. `reads` and `writes` are the activations' names, one per layer; `len` is the
    total number of features. `path` and `form` are the source and its format.
    """

    def __init__(self, layers: Sequence[Features], biases: Sequence[Tensor | None], *, path: Path):
        self.layers, self.biases, self.path = tuple(layers), tuple(biases), path

    @property
    def form(self) -> str:
        return self.layers[0].form

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(layer.reads for layer in self.layers)

    @property
    def writes(self) -> tuple[str, ...]:
        return tuple(layer.writes[0] for layer in self.layers)

    @property
    def dim(self) -> int:
        return self.layers[0].dim

    def __len__(self) -> int:
        return sum(map(len, self.layers))

    def __repr__(self) -> str:
        return f"CrossLayerTranscoder({len(self):,} features of {len(self.layers)} layers)"

    def check(self, model: Transformer) -> None:
        """Raise RequestError unless the features were trained for a model of this shape."""
        check_model(model)
        self.check_args(model.args)

    def check_args(self, args: ModelArgs) -> None:
        """Like `check`, for a model's args."""
        if (self.dim, len(self.layers)) != (args.dim, args.n_layers):
            raise RequestError(
                f"{self.path} has {len(self.layers)} layers of {self.dim} dimensions, but the model has {args.n_layers} of"
                f" {args.dim}: use the transcoder of this model"
            )

    def active(self, x: Sequence[Tensor] | Trace) -> list[Active]:
        """The features of each layer that fire; tokens are counted over all axes but the last.

        `x` is a trace that has all `reads`, or these activations (…, D), one per layer.
        """
        return [layer.active(own) for layer, own in zip(self.layers, self._inputs(x), strict=True)]

    @torch.no_grad()
    def encode(self, x: Sequence[Tensor] | Trace) -> list[Tensor]:
        """The values of each layer's features, 0 where they do not fire: float32 (…, S). `active` returns lists instead."""
        return [layer.encode(own) for layer, own in zip(self.layers, self._inputs(x), strict=True)]

    @torch.no_grad()
    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """Decode the values (…, S) of each layer's features to the outputs of all feed-forwards: float32 (L, …, D).

        Raises RequestError for another number of layers, tokens or features.
        """
        given = self._each(features, "values of features")
        out = self.layers[0].decode(given[0]).movedim(-2, 0)  # (layers left, …, D)
        for i, layer in enumerate(self.layers[1:], 1):
            out[i:] += layer.decode(given[i]).movedim(-2, 0)
        for own, bias in zip(out, self.biases, strict=True):
            if bias is not None:
                own += bias.to(own)
        return out

    def reconstruct(self, x: Sequence[Tensor] | Trace) -> Tensor:
        """`decode` of `encode`, without the large tensors in between: float32 (L, …, D)."""
        inputs = self._inputs(x)
        found = self.active(inputs)
        return torch.stack([self.decode_layer(i, found).unflatten(0, own.shape[:-1]) for i, own in enumerate(inputs)])

    @torch.no_grad()
    def decode_layer(self, layer: int, found: Sequence[Active]) -> Tensor:
        """One feed-forward's output, decoded from the features of its own and earlier layers: float32 (tokens, D)."""
        total = self.layers[0].summed(found[0], layer)
        for source in range(1, layer + 1):
            total += self.layers[source].summed(found[source], layer - source)
        bias = self.biases[layer]
        return total if bias is None else total + bias.to(total)

    def _inputs(self, x: Sequence[Tensor] | Trace) -> list[Tensor]:
        return self._each([x[name] for name in self.reads] if isinstance(x, Trace) else x, "activations")

    def _each(self, given: Sequence[Tensor], what: str) -> list[Tensor]:
        """One tensor per layer, checked to have the same number of tokens."""
        found = list(given) if isinstance(given, Sequence | Tensor) else []
        if len(found) != len(self.layers) or not all(isinstance(own, Tensor) for own in found):
            raise RequestError(f"expected {what} of the {len(self.layers)} layers of {self.path}: one tensor for each")
        if len({own.shape[:-1] for own in found}) > 1:
            raise RequestError(f"the {what} have different shapes in different layers: give those of the same tokens")
        return found
