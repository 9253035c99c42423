"""Quantization schemes: the bits of each matrix, and the group size."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama_ref.errors import CheckpointError, RequestError
from llama_ref.formatting import did_you_mean

DEFAULT_GROUP = 128
GROUPS = (32, 64, 128, 256)  # the sizes that PyTorch's kernels support
SCALE_BITS = {8: 32, 4: 16}
UNQUANTIZED = ("vision_model.", "learnable_embedding.")  # the vision encoder: a tenth of the weights
SPELLINGS = ("int8", "int4", *(f"int4:group={size}" for size in GROUPS))
POSSIBLE = "int8, int4 or int4:group=N, with N one of " + ", ".join(map(str, GROUPS))


@dataclass(frozen=True)
class Scheme:
    """8 bits with one scale per row, or 4 with a scale and a zero point per `group` weights.

    Embedding and output have 8 bits in both schemes: with 4, the output alone cost the demo
    checkpoint as much quality as all layers together (scripts/bench_quality.py). Norms are not
    quantized.
    """

    bits: int
    group: int | None = None

    @classmethod
    def parse(cls, text: "str | Scheme", name: str = "quantize") -> "Scheme":
        """Parse "int8", "int4" (groups of 128) or "int4:group=32".

        Raises RequestError naming the valid ones.
        `name` is the option's name in that error.
        """
        if isinstance(text, Scheme):
            return text
        match = re.fullmatch(r"int(8|4)(?::group=([0-9]{1,4}))?", text) if isinstance(text, str) else None
        if not match or (match[1] == "8" and match[2]):
            raise RequestError(f"{name} is {text!r:.60}, expected {POSSIBLE}{did_you_mean(str(text), SPELLINGS)}")
        if match[1] == "8":
            return cls(8)
        group = int(match[2] or DEFAULT_GROUP)
        if group not in GROUPS:
            raise RequestError(f"{name} is {text!r}: groups of {group} are not supported, expected {POSSIBLE}")
        return cls(4, group)

    def __str__(self) -> str:
        return "int8" if self.bits == 8 else "int4" if self.group == DEFAULT_GROUP else f"int4:group={self.group}"

    def bits_of(self, name: str) -> int | None:
        """Bits per weight of the tensor with this name ("layers.0.attention.wq.weight").

        None if not quantized.
        """
        kind = name.removesuffix(".weight").split(".")[-1]
        if kind.endswith("norm") or name.startswith(UNQUANTIZED) or ".gate_" in name:
            return None
        return 8 if kind in ("tok_embeddings", "output") else self.bits

    def group_for(self, name: str, columns: int) -> int:
        """The group size for a tensor: the scheme's, halved until it divides the number of columns.

        Raises RequestError if none does.
        """
        if self.group is None:
            raise ValueError(f"{self} has one scale per row, no groups")
        group = self.group
        while columns % group and group > GROUPS[0]:
            group //= 2
        if columns % group:
            raise RequestError(
                f"{name} has rows of {columns:,}, not divisible by a group of {', '.join(map(str, GROUPS))}: use int8"
                " (or another number of processes)"
            )
        return group

    def to_params(self) -> dict[str, Any]:
        """The value of "quantization" in params.json, as `from_params` reads it."""
        return {"scheme": f"int{self.bits}"} | ({"group": self.group} if self.bits == 4 else {})

    @classmethod
    def from_params(cls, value: Any) -> "Scheme":
        """Read the value of "quantization" in params.json.

        Raises CheckpointError for an invalid one.
        """
        section = value if isinstance(value, Mapping) else {}
        scheme, group = section.get("scheme"), section.get("group")
        if scheme == "int8" and group is None:
            return cls(8)
        if scheme != "int4" or type(group) is not int or group not in GROUPS:
            raise CheckpointError(
                f'"quantization" is {value!r:.80}, expected "scheme" int8, or int4 with a "group" of one of '
                f"{', '.join(map(str, GROUPS))}; was it written by another program?"
            )
        return cls(4, group)
