"""Shared by all drafters: their interface, and how many tokens are worth guessing."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from llama_ref.compiled.forward import compiled_forward
from llama_ref.decoding.row import Row
from llama_ref.formatting import dtype_name
from llama_ref.model import Transformer
from llama_ref.quantization.linear import Int8Matrix, QuantizedMatrix
from llama_ref.sampling import Sampler

LONGEST_DRAFT = 12  # tokens
RATE_MOMENTUM = 0.1  # weight of the newest guess in the moving average of the acceptance rate

# PassTime's (several, each) by the weights' format and whether decoding is compiled, for Llama 3.2
# 1B's shape on two cores.
MEASURED = {
    ("bfloat16", False): (1.4, 0.04),
    ("bfloat16", True): (1.4, 0.05),
    ("float32", False): (2.5, 0.0),
    ("float32", True): (2.5, 0.0),  # taken from the uncompiled one, not measured
    ("int8", False): (0.40, 0.22),
    ("int8", True): (0.68, 0.34),
    ("int4", False): (0.47, 0.44),
    ("int4", True): (7.4, 0.31),
}
# The same on an H200 (scripts/bench_cuda.py, stages speculate and batch). Uncompiled passes are bound
# by kernel launches, whose number does not depend on T. A compiled step of one token has special
# kernels; a pass over several tokens uses cuBLAS, or kernels that read a quantized matrix more
# slowly: 1.34 steps in bfloat16 on the 8B, 1.78 on the 1B.
MEASURED_ON_CUDA = {
    ("bfloat16", False): (1.0, 0.01),
    ("bfloat16", True): (1.55, 0.005),
    ("int8", False): (1.0, 0.01),
    ("int8", True): (1.7, 0.01),
    ("int4", False): (1.0, 0.01),
    ("int4", True): (3.3, 0.02),
}


@dataclass(frozen=True)
class PassTime:
    """Time of a forward pass over T > 1 tokens, in decode steps: `several` + T · `each`.

    The defaults are those of bfloat16 on a CPU. Nothing is timed while generating, so that runs are
    reproducible and all processes of a parallel job make drafts of the same length.
    """

    several: float = 1.4
    each: float = 0.04

    @classmethod
    def for_model(cls, model: Transformer) -> "PassTime":
        """The time measured for models of this kind (scripts/bench_speculate.py prints it).

        Quantization and compiling make a step cheaper, and a pass over several tokens less so.
        """
        block = model.layers[0]  # every pipeline stage has one
        matrix = block.attention.wq
        dtype = dtype_name(model.dtype)
        kind = "int8" if isinstance(matrix, Int8Matrix) else "int4" if isinstance(matrix, QuantizedMatrix) else dtype
        is_compiled = any(compiled_forward(module) for module in (model, block))
        measured = MEASURED if model.device.type == "cpu" else MEASURED_ON_CUDA
        return cls(*measured.get((kind, is_compiled), measured["bfloat16", is_compiled]))

    def with_guesses(self, n: int) -> float:
        """Time of a pass over the last token and `n` guesses, in decode steps."""
        return max(1.0, self.several + (n + 1) * self.each) if n else 1.0


class AcceptanceRate:
    """Moving average of how often guesses are right, and the best draft length for it."""

    def __init__(self, prior: float):
        self.value = prior

    def update(self, was_right: bool) -> None:
        self.value += RATE_MOMENTUM * (was_right - self.value)

    def best_length(self, at_most: int, pass_time: PassTime, cost: float = 0.0) -> int:
        """The draft length with the most tokens per time, if a guess costs `cost` decode steps."""

        def tokens_per_step(n: int) -> float:
            return sum(self.value**i for i in range(n + 1)) / (pass_time.with_guesses(n) + n * cost)

        return max(range(min(at_most, LONGEST_DRAFT) + 1), key=tokens_per_step)


@dataclass
class Draft:
    """Guessed tokens, and the distributions (V,) they were drawn from: none if deterministic."""

    tokens: list[int] = field(default_factory=list)
    drawn_from: list[Tensor] = field(default_factory=list)


class Drafter(Protocol):
    """Guesses how one row continues."""

    def draft(self, row: Row, at_most: int, sampler: Sampler) -> Draft:
        """Guess up to `at_most` tokens that follow the row's.

        `sampler` is the row's; drafting advances its random generator and changes nothing else.
        """
        ...


class Speculation(Protocol):
    """A method of guessing tokens."""

    def drafting(self, rows: list[Row]) -> AbstractContextManager[Sequence[Drafter]]:
        """One drafter for each row of a new batch, for as long as it is generated."""
        ...
