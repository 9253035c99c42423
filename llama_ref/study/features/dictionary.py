"""A dictionary of features: encode an activation as features that fire, and decode them.

    u = x · into − input_bias            f = activation(u W_encᵀ + b_enc)
    y = (f W_dec + b_dec) · out + x W_skipᵀ

Weights stay in their stored dtype, memory-mapped; blocks of them are converted to float32 when used.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.model import Transformer
from llama_ref.parallel.division import whole_args
from llama_ref.study.features.activations import Activation, Scaling, Threshold, TopK
from llama_ref.study.features.active import Active
from llama_ref.study.features.sites import Site
from llama_ref.study.inputs import check_index
from llama_ref.study.passes.hooks import check_part
from llama_ref.study.trace import Trace

BLOCK_NUMBERS = 1 << 24  # elements of a matrix that are converted to float32 at a time: 64 MB
BLOCK_TOKENS = 1024
EPSILON = 1e-5  # norm_eps of every Llama 3 model


@dataclass(frozen=True)
class Weights:
    """A dictionary's matrices for S features of D dimensions, in any floating-point dtype.

    `encoder` (S, D), `encoder_bias` (S,), `decoder` (S, D), `decoder_bias` (D,); `input_bias` (D,) is
    subtracted before encoding, `skip` (D, D) maps the input directly to the output. A cross-layer
    transcoder's `decoder` is (S, W, D), for the W layers that it writes to.
    """

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor | None = None
    input_bias: Tensor | None = None
    skip: Tensor | None = None


class Features:
    """Features of a model's activation: a sparse autoencoder, or a transcoder.

    `reads` and `writes` are the activations' names. An autoencoder writes the activation that it reads; a
    transcoder writes the feed-forward's output, a cross-layer transcoder those of several layers. `len` is
    the number of features. `path` and `form` are the source and its format.
    """

    def __init__(
        self, weights: Weights, activation: Activation, site: Site, scaling: Scaling | None = None, *, path: Path, form: str
    ):
        self.weights, self.activation, self.site = weights, activation, site
        self.scaling = scaling or Scaling()
        self.path, self.form = path, form

    @property
    def reads(self) -> str:
        return self.site.reads

    @property
    def writes(self) -> tuple[str, ...]:
        """Names of the activations that are written: several only for a cross-layer transcoder."""
        if self.weights.decoder.dim() == 2:
            return (self.site.writes,)
        own, ending = self.site.layer, self.site.writes.split(".", 2)[2]
        return tuple(f"layers.{own + i}.{ending}" for i in range(self.weights.decoder.shape[1]))

    @property
    def dim(self) -> int:
        return self.weights.encoder.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored matrices; values of features are float32."""
        return self.weights.encoder.dtype

    @property
    def is_transcoder(self) -> bool:
        return self.writes != (self.reads,)

    def __len__(self) -> int:
        return self.weights.encoder.shape[0]

    def __repr__(self) -> str:
        where = self.reads if not self.is_transcoder else f"{self.reads} → {', '.join(self.writes)}"
        return f"Features({len(self):,} of {where}, {self.form})"

    def check(self, model: Transformer) -> None:
        """Raise RequestError unless the features fit a model of this shape."""
        check_part(model)
        self.check_args(whole_args(model))

    def check_args(self, args: ModelArgs) -> None:
        """Like `check`, for a model's args."""
        last = int(self.writes[-1].split(".")[1])
        if self.dim != args.dim or last >= args.n_layers:
            raise RequestError(
                f"{self.path} has features of {self.dim} dimensions, up to layer {last}, but the model has {args.dim}"
                f" and layers 0 to {args.n_layers - 1}: use features of this model"
            )

    # ---- encode and decode

    @torch.no_grad()
    def encode(self, x: Tensor | Trace) -> Tensor:
        """The features' values, 0 where they do not fire: (…, D) -> float32 (…, S).

        `x` is the activation called `reads`, or a trace that has it. For many tokens use `active`, which
        returns a list. Raises RequestError for another shape, CheckpointError for weights that are not
        finite.
        """
        given = self._input(x)
        return self.active(given).dense().unflatten(0, given.shape[:-1])

    @torch.no_grad()
    def active(self, x: Tensor | Trace) -> Active:
        """The features that fire; tokens are counted over all axes but the last."""
        rows = self._input(x).flatten(0, -2)
        parts = [(start, self._fire(rows[start : start + BLOCK_TOKENS])) for start in range(0, len(rows), BLOCK_TOKENS)]
        tokens = torch.cat([found[0] + start for start, found in parts]) if parts else rows.new_zeros(0).long()
        features = torch.cat([found[1] for _, found in parts]) if parts else tokens
        values = torch.cat([found[2] for _, found in parts]) if parts else rows.new_zeros(0).float()
        return Active.from_triples(tokens, features, values, len(rows), len(self))

    @torch.no_grad()
    def encode_some(self, x: Tensor | Trace, features: Sequence[int]) -> Tensor:
        """The values of some features: float32 (…, n). Only their rows are read.

        TopK must compare all features, but only at tokens where the sign of one of these lets it fire.
        """
        chosen = torch.tensor([check_index("feature", each, len(self)) for each in features], dtype=torch.long, device="cpu")
        given = self._input(x)
        if not isinstance(self.activation, TopK):
            return self._values(self._prepared(given), chosen)
        rows = given.flatten(0, -2)
        own = self._linear(self._prepared(rows), chosen)
        candidates = (own != 0 if self.activation.signed else own > 0).any(-1)
        out = torch.zeros_like(own)
        out[candidates] = self.active(rows[candidates]).columns(chosen.to(given.device))
        return out.unflatten(0, given.shape[:-1])

    @torch.no_grad()
    def decode(self, f: Tensor, x: Tensor | Trace | None = None) -> Tensor:
        """Decode features' values (…, S) to an activation: float32 (…, D); (…, W, D) for a cross-layer transcoder.

        `x`, the encoded activation, is needed with a skip matrix and with scaling by token. Only rows of
        features that fire are read. Raises RequestError.
        """
        if not isinstance(f, Tensor) or f.dim() < 1 or f.shape[-1] != len(self):
            shown = f"a tensor {tuple(f.shape)}" if isinstance(f, Tensor) else f"a {type(f).__name__}"
            raise RequestError(f"f is {shown}, expected values of features (…, {len(self)})")
        flat = f.reshape(-1, len(self)).float()
        fire = flat.any(0).nonzero()[:, 0]
        total = flat.new_zeros(len(flat), self._width)
        for some in fire.split(self._block):
            total += flat[:, some] @ self.rows(some).to(f.device)
        out = self._leave(total.unflatten(0, f.shape[:-1]) if f.dim() > 1 else total[0], self._needed(x))
        return out if self.weights.decoder.dim() == 2 else out.unflatten(-1, self.weights.decoder.shape[1:])

    def reconstruct(self, x: Tensor | Trace) -> Tensor:
        """The reconstruction of an activation: `decode` of its `encode`, without the large tensor in between."""
        return self.decode_active(self.active(x), x)

    @torch.no_grad()
    def decode_active(self, found: Active, x: Tensor | Trace) -> Tensor:
        """`decode` for a list of features that fire at `x`; their values may have been changed."""
        given = self._input(x)
        total = self.summed(found)
        out = self._leave(total.unflatten(0, given.shape[:-1]), given)
        return out if self.weights.decoder.dim() == 2 else out.unflatten(-1, self.weights.decoder.shape[1:])

    def summed(self, found: Active, place: int | None = None) -> Tensor:
        """Sum of decoder rows times values, without bias and scale: float32 (tokens, D), or (tokens, W · D).

        `place` selects one of the W layers that a cross-layer transcoder writes to: (tokens, D).
        """
        width = self._width if place is None else self.dim
        total = found.values.new_zeros(found.n_tokens, width)
        for some in torch.arange(len(found.values), device=total.device).split(max(1, BLOCK_NUMBERS // width)):
            rows = self.rows(found.features[some], place).to(total.device)
            total.index_add_(0, found.tokens[some], rows * found.values[some, None])
        return total

    def rows(self, features: Sequence[int] | Tensor, place: int | None = None) -> Tensor:
        """Decoder rows as stored, in the dictionary's own scale: float32 (n, D), or (n, W · D).

        `place` selects one of a cross-layer transcoder's W layers: (n, D). Only the requested rows are read.
        Raises CheckpointError if they are not finite.
        """
        decoder = self.weights.decoder if place is None else self.weights.decoder[:, place]
        chosen = torch.as_tensor(features, dtype=torch.long).to(decoder.device)
        return self._finite("decoder", decoder[chosen].flatten(1).float())

    def direction(self, feature: int) -> Tensor:
        """The vector that one unit of a feature adds to the activation: float32 (D,), or (W, D)."""
        if self.scaling.by_token:
            raise RequestError(f"{self.path} scales each token by its own length: a feature has no fixed direction")
        row = self.rows([check_index("feature", feature, len(self))])[0] * self.scaling.out
        return row if self.weights.decoder.dim() == 2 else row.unflatten(0, self.weights.decoder.shape[1:])

    # ---- steps

    @property
    def _width(self) -> int:
        return self.weights.decoder[0].numel()

    @property
    def _block(self) -> int:
        """The number of a matrix's rows that are converted to float32 at a time."""
        return max(1, BLOCK_NUMBERS // max(self.dim, self._width))

    def _input(self, x: Tensor | Trace) -> Tensor:
        given = x[self.reads] if isinstance(x, Trace) else x
        if not isinstance(given, Tensor) or given.dim() < 2 or given.shape[-1] != self.dim or not given.is_floating_point():
            shown = f"a tensor {tuple(given.shape)} of {given.dtype}" if isinstance(given, Tensor) else f"{given!r:.60}"
            raise RequestError(f"x is {shown}, expected activations {self.reads} (…, {self.dim})")
        return given.detach()

    def _needed(self, x: Tensor | Trace | None) -> Tensor | None:
        if x is None and (self.weights.skip is not None or self.scaling.by_token):
            raise RequestError(f"{self.path} needs the input to decode: pass x, the encoded activation")
        return None if x is None else self._input(x)

    def _read(self, x: Tensor) -> Tensor:
        """The dictionary's input before its own scaling: float32."""
        wide = x.float()
        if self.site.reads_unscaled_norm:
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
        return wide

    def _prepared(self, x: Tensor) -> Tensor:
        wide = self._read(x)
        wide = wide * self.scaling.factors(wide)[0]
        return wide if self.weights.input_bias is None else wide - self.weights.input_bias.to(wide)

    def _leave(self, total: Tensor, x: Tensor | None) -> Tensor:
        """Add the bias to decoded features, scale them back to the model's scale, and add the skip connection."""
        read = None if x is None else self._read(x)
        out = total if self.weights.decoder_bias is None else total + self.weights.decoder_bias.to(total)
        out = out * (self.scaling.factors(read)[1] if read is not None else self.scaling.out)
        if self.weights.skip is not None and read is not None:
            out = out + F.linear(read, self._finite("skip", self.weights.skip.float()).to(read.device))
        return out

    def _fire(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The features that fire for activations (n, D): tokens, features, values."""
        prepared = self._prepared(rows)
        blocks = (
            (start, self._linear(prepared, slice(start, start + self._block))) for start in range(0, len(self), self._block)
        )
        if isinstance(self.activation, TopK):
            return _largest(blocks, self.activation)
        found = []
        for start, values in blocks:
            some = slice(start, start + values.shape[1])
            tokens, features = (values > self._least(some).to(values)).nonzero(as_tuple=True)
            found.append((tokens, features + start, values[tokens, features]))
        tokens, features, values = (torch.cat(each) for each in zip(*found, strict=True))
        kept = values != 0  # a value of 0 can exceed a threshold below zero
        return tokens[kept], features[kept], values[kept]

    def _values(self, prepared: Tensor, chosen: Tensor) -> Tensor:
        """The values of chosen features after the threshold."""
        values = self._linear(prepared, chosen)
        return torch.where(values > self._least(chosen).to(values), values, 0)

    def _linear(self, prepared: Tensor, some: slice | Tensor) -> Tensor:
        """Values before the activation function. Raises CheckpointError if weights are not finite, RequestError if x is not."""
        weight, bias = self.weights.encoder[some].float(), self.weights.encoder_bias[some].float()
        out = F.linear(prepared, weight.to(prepared.device), bias.to(prepared.device))
        if not out.isfinite().all():
            self._finite("encoder", weight)
            raise RequestError(f"x has values that are not finite, or too large, at {self.reads}")
        return out

    def _least(self, some: slice | Tensor) -> Tensor:
        assert isinstance(self.activation, Threshold)
        least = self.activation.for_features(some).float()
        if not self.activation.by_decoder_norm:
            return least
        return least / (self.rows(some).norm(dim=-1) if isinstance(some, Tensor) else self._norms[some])

    @cached_property
    def _norms(self) -> Tensor:
        """Norms of all decoder rows."""
        blocks: Iterator[Tensor] = (self.rows(some) for some in torch.arange(len(self), device="cpu").split(self._block))
        return torch.cat([block.norm(dim=-1) for block in blocks])

    def _finite(self, what: str, values: Tensor) -> Tensor:
        if not values.isfinite().all():
            raise CheckpointError(f"{self.path} has values that are not finite in its {what}: fetch it again")
        return values


def _largest(blocks: Iterator[tuple[int, Tensor]], top: TopK) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest features of each token, over blocks of features: tokens, features, values."""
    best: tuple[Tensor, Tensor] | None = None
    for start, values in blocks:
        own = values.topk(min(top.k, values.shape[1]), dim=-1)
        candidates = (own.values, own.indices + start)
        if best is not None:
            candidates = (torch.cat([best[0], candidates[0]], -1), torch.cat([best[1], candidates[1]], -1))
        kept = candidates[0].topk(min(top.k, candidates[0].shape[1]), dim=-1)
        best = kept.values, candidates[1].gather(-1, kept.indices)
    assert best is not None
    fires = best[0] != 0 if top.signed else best[0] > 0
    tokens, columns = fires.nonzero(as_tuple=True)
    return tokens, best[1][tokens, columns], best[0][tokens, columns]
