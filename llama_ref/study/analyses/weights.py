"""Measure weight matrices: their singular values, and the error of quantizing them."""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.quantization.apply import check_columns, is_quantized, quantized
from llama_ref.quantization.linear import QuantizedMatrix
from llama_ref.quantization.scheme import Scheme
from llama_ref.study.analyses.attribution import matrix

ROWS_AT_A_TIME = 1 << 13  # converted to float64


@dataclass(frozen=True)
class Spectrum:
    """A matrix's singular values, largest first: float64, CPU; NaN if a weight is not finite."""

    name: str
    shape: tuple[int, int]
    values: Tensor

    @property
    def stable_rank(self) -> float:
        """‖W‖²_F / σ₁²: 1 if one singular value dominates, their number if all are equal."""
        return (self.values / self.values[0]).square().sum().item()

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of σ / Σσ (Roy and Vetterli, 2007)."""
        return torch.special.entr(self.values / self.values.sum()).sum().exp().item()


@dataclass(frozen=True)
class QuantizationError:
    """Error of quantizing a matrix: `relative` ‖W - W'‖ / ‖W‖, `largest` |w - w'| of a weight."""

    name: str
    bits_per_weight: float
    relative: float
    largest: float


@torch.no_grad()
def spectra(model: Transformer, names: str = "*", progress: Progress | None = None) -> Iterator[Spectrum]:
    """Singular values of every matrix whose name ("layers.0.attention.wq.weight") matches the glob.

    Computed from the smaller of WWᵀ and WᵀW in float64, whose size does not grow with the
    vocabulary; values below 1e-8 of the largest are noise. A tied output is the same matrix as the
    embedding and is left out. `progress` is called with the matrices done and their number. Raises
    RequestError if nothing matches.
    """
    for name, module in _counted(_matrices(model, names), progress):
        weight = matrix(module)
        n_out, n_in = weight.shape
        yield Spectrum(name, (n_out, n_in), _singular_values(weight))


@torch.no_grad()
def quantization_errors(
    model: Transformer, scheme: Scheme | str, names: str = "*", progress: Progress | None = None
) -> Iterator[QuantizationError]:
    """The error of a quantization scheme ("int8", "int4:group=32") in each matrix whose name matches.

    Weights are rounded as when loading with `quantize`. Raises RequestError for a quantized model, a
    matrix that does not fit the scheme, or a glob that matches nothing.
    """
    scheme = Scheme.parse(scheme)
    if is_quantized(model):
        raise RequestError("the model is already quantized: load it without quantize to measure the rounding error")
    chosen = _matrices(model, names)
    for name, module in chosen:
        check_columns(scheme, name, module.get_parameter("weight").shape[1])
    for name, module in _counted(chosen, progress):
        weight = module.get_parameter("weight").detach()
        rounded = quantized(scheme, name, weight, weight.dtype)
        assert rounded is not None  # `quantized` skips no matrix of an unquantized model
        yield _error(name, weight.float(), rounded)


def _error(name: str, weight: Tensor, rounded: QuantizedMatrix) -> QuantizationError:
    difference = rounded.dequantize() - weight
    relative = difference.norm() / weight.norm()
    bits = 8 * rounded.quantized_bytes / weight.numel()
    return QuantizationError(name, bits, relative.item(), difference.abs().max().item())


def _matrices(model: Transformer, names: str) -> list[tuple[str, nn.Module]]:
    if not isinstance(names, str):
        raise RequestError(f"names is {names!r:.60}, expected a matrix's name or a glob of names, such as 'layers.0.*'")
    kinds = (nn.Linear, nn.Embedding, QuantizedMatrix)
    found: list[tuple[str, nn.Module]] = []
    outer = None
    for name, module in model.named_modules():
        if outer is not None and name.startswith(f"{outer}."):
            continue  # a submodule of the previous matrix
        if isinstance(module, kinds):
            outer = name
            found.append((f"{name}.weight", module))
    if _is_tied(model):
        found = [(name, module) for name, module in found if name != "output.weight"]
    chosen = [(name, module) for name, module in found if fnmatchcase(name, names)]
    if not chosen:
        raise RequestError(
            f"no matrix is called {names!r:.80}; the names are {found[0][0]}, {found[1][0]}, …, and the model has layers 0 to"
            f" {model.args.n_layers - 1}"
        )
    return chosen


def _counted(matrices: list[tuple[str, nn.Module]], progress: Progress | None) -> Iterator[tuple[str, nn.Module]]:
    counter = ProgressCounter(len(matrices), progress)
    counter.advance(0)
    for named in matrices:
        yield named
        counter.advance()


def _is_tied(model: Transformer) -> bool:
    if isinstance(model.output, QuantizedMatrix):
        return next(model.output.buffers()).data_ptr() == next(model.tok_embeddings.buffers()).data_ptr()
    return model.output.weight is model.tok_embeddings.weight


def _singular_values(weight: Tensor) -> Tensor:
    weight = weight.cpu() if weight.device.type == "mps" else weight  # MPS has no float64
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    if not weight.isfinite().all():
        return torch.full((tall.shape[1],), torch.nan, dtype=torch.float64, device="cpu")
    gram = sum(rows.double().T @ rows.double() for rows in tall.split(ROWS_AT_A_TIME))  # (min, min)
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0).cpu()
