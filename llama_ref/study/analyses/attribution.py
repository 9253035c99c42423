"""Direct logit attribution: how much each part of the model adds to a token's logit.

The last residual is a sum: the embedding, each head's output through its columns of `wo`, each
feed-forward's output. With the final norm's scale held fixed, the logit is linear in that sum, so
each part has a share and the shares add up. Indirect effects, through later layers, are not
included. Source: Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ref.errors import LlamaRefError
from llama_ref.model import Transformer
from llama_ref.quantization.linear import QuantizedMatrix
from llama_ref.study.inputs import check_index, check_token, one_row
from llama_ref.study.passes.hooks import check_model
from llama_ref.study.trace import trace
from llama_ref.study.vision.images import Images

# Tolerance of the sum, in machine epsilons of the total of all absolute summands: the model rounds
# each part, and the residual stream after every addition.
ROUNDINGS = 16


@dataclass(frozen=True)
class Attribution:
    """Shares of `target`'s logit at one position, or of its difference to `other`'s; float32, CPU.

    `embedding` is a number, `heads` (n_layers, H), `ffns` (n_layers,). With an image, `cross` has each
    cross-attention layer's share; its key is the layer that follows it. The shares add up to `total`,
    which differs from the model's own `logit` only by rounding.
    """

    tokens: list[int]
    position: int
    target: int
    other: int | None
    logit: float
    embedding: float
    heads: Tensor
    ffns: Tensor
    cross: Mapping[int, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        layers = self.heads.double().sum().item() + self.ffns.double().sum().item()
        return self.embedding + layers + sum(self.cross.values())

    @property
    def strongest_head(self) -> tuple[int, int]:
        """(layer, head) of the largest share."""
        layer, head = divmod(int(self.heads.argmax()), self.heads.shape[1])
        return layer, head

    def parts(self) -> Iterator[tuple[str, float]]:
        """All shares, in the model's order: embedding, layers.0.heads.0, …, layers.0.ffn, …, cross_layers.0"""
        yield "embedding", self.embedding
        numbers = {layer: i for i, layer in enumerate(self.cross)}
        for layer, (heads, ffn) in enumerate(zip(self.heads.tolist(), self.ffns.tolist(), strict=True)):
            if layer in numbers:
                yield f"cross_layers.{numbers[layer]}", self.cross[layer]
            yield from ((f"layers.{layer}.heads.{head}", share) for head, share in enumerate(heads))
            yield f"layers.{layer}.ffn", ffn


@torch.no_grad()
def attribute(
    model: Transformer,
    tokens: Sequence[int] | Tensor,
    target: int,
    other: int | None = None,
    *,
    position: int = -1,
    images: Images | None = None,
) -> Attribution:
    """Split a token's logit after one position, or its difference to `other`'s, into shares.

    `images` as in `trace`. Raises RequestError for an unknown token or position, and LlamaRefError if
    the shares do not add up to the logit within rounding, for example because a weight is not finite.
    """
    check_model(model)
    row = one_row(model, tokens)
    position = check_index("position", position, row.shape[1])
    target, other = check_token(model, target), None if other is None else check_token(model, other)
    layers = range(model.args.n_layers)
    last = f"layers.{layers[-1]}.residual_post"
    names = [f"layers.{layer}.{part}" for layer in layers for part in ("attention.head_output", "ffn.output")]
    cross = {layer: f"cross_layers.{i}" for i, layer in enumerate(model.args.cross_layers if images else [])}
    names += [f"{own}.{part}.output" for own in cross.values() for part in ("attention", "ffn")]
    traced = trace(model, row, ["embedding", *names, last, "norm"], images=images)
    here = {name: traced[name][0, position].float() for name in ("embedding", *names, last)}
    direction = _direction(model, here[last], target, other)  # (D,)
    heads = [_head_shares(model, layer, here[f"layers.{layer}.attention.head_output"], direction) for layer in layers]
    ffns = [here[f"layers.{layer}.ffn.output"] @ direction for layer in layers]
    logits = model.logits(traced["norm"][:, position])[0]
    logit = logits[target] if other is None else logits[target] - logits[other]
    found = Attribution(
        tokens=row[0].tolist(),
        position=position,
        target=target,
        other=other,
        logit=logit.item(),
        embedding=(here["embedding"] @ direction).item(),
        heads=torch.stack(heads).cpu(),
        ffns=torch.stack(ffns).cpu(),
        cross={
            layer: ((here[f"{own}.attention.output"] + here[f"{own}.ffn.output"]) @ direction).item()
            for layer, own in cross.items()
        },
    )
    _check_sum(model, found, here[last], direction)
    return found


def part_label(name: str) -> str:
    """A part's name for display: layers.3.heads.5 -> layer 3 head 5; cross_layers.1 -> cross layer 1"""
    return " ".join(name.replace("layers", "layer").replace("heads", "head").replace("_", ".").split("."))


def _direction(model: Transformer, residual: Tensor, target: int, other: int | None) -> Tensor:
    """Gradient of the logit by the residual, with the norm's scale held fixed: (D,)."""
    scale = torch.rsqrt(residual.pow(2).mean() + model.norm.eps)
    unembedding = matrix_rows(model.output, [target] if other is None else [target, other])
    wanted = unembedding[0] if other is None else unembedding[0] - unembedding[1]
    return scale * model.norm.weight.float() * wanted


def _head_shares(model: Transformer, layer: int, head_output: Tensor, direction: Tensor) -> Tensor:
    """Each head's share, through its own columns of `wo`: (H, hd) -> (H,)."""
    read = direction @ matrix(model.get_submodule(f"layers.{layer}.attention.wo"))  # (D,) @ (D, H·hd) -> (H·hd,)
    return (head_output * read.view_as(head_output)).sum(-1)


def _check_sum(model: Transformer, found: Attribution, residual: Tensor, direction: Tensor) -> None:
    added = sum(abs(share) for _, share in found.parts()) + (residual * direction).abs().sum().item()
    allowed = ROUNDINGS * torch.finfo(model.norm.weight.dtype).eps * added
    if not abs(found.total - found.logit) <= allowed:
        raise LlamaRefError(
            f"the parts add up to {found.total:g}, but the logit is {found.logit:g}, and rounding explains {allowed:.2g} at"
            " most: are all weights finite (llama-ref verify --deep), or was the model changed from outside?"
        )


def matrix(module: nn.Module) -> Tensor:
    """Float32 weight (out, in) of a linear layer or embedding, quantized or not."""
    return module.dequantize() if isinstance(module, QuantizedMatrix) else module.get_parameter("weight").detach().float()


def matrix_rows(module: nn.Module, rows: list[int]) -> Tensor:
    """Some rows of `matrix(module)`; only these are converted unless the matrix is quantized."""
    if isinstance(module, QuantizedMatrix):
        return module.dequantize()[rows]
    weight = module.get_parameter("weight").detach()
    return F.embedding(torch.tensor(rows, device=weight.device), weight).float()
