"""Which matrices get how many bits, and in groups of how many weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama_ref.errors import CheckpointError, RequestError

DEFAULT_GROUP = 128
GROUPS = (32, 64, 128, 256)  # those that PyTorch's own kernels know
SCALE_BITS = {8: 32, 4: 16}
POSSIBLE = "int8, int4 or int4:group=N, with N one of " + ", ".join(map(str, GROUPS))


@dataclass(frozen=True)
class Scheme:
    """`bits` for every matrix: 8, with one scale per row, or 4, with a scale and a zero point per `group` of a row's weights.

    Embedding and output have eight bits in either: an output in four cost the demo checkpoint as much as all layers together
    (scripts/bench_quality.py). Norms stay as they are.
    """

    bits: int
    group: int | None = None

    @classmethod
    def parse(cls, text: "str | Scheme", name: str = "quantize") -> "Scheme":
        """ "int8", "int4" (groups of 128) or "int4:group=32". Raises RequestError that says what is possible.

        `name` is what the text was given as.
        """
        if isinstance(text, Scheme):
            return text
        match = re.fullmatch(r"int(8|4)(?::group=([0-9]{1,4}))?", text) if isinstance(text, str) else None
        if not match or (match[1] == "8" and match[2]):
            raise RequestError(f"{name} is {text!r:.60}, expected {POSSIBLE}")
        if match[1] == "8":
            return cls(8)
        group = int(match[2] or DEFAULT_GROUP)
        if group not in GROUPS:
            raise RequestError(f"{name} is {text!r}: groups of {group} are not possible, expected {POSSIBLE}")
        return cls(4, group)

    def __str__(self) -> str:
        return "int8" if self.bits == 8 else "int4" if self.group == DEFAULT_GROUP else f"int4:group={self.group}"

    def bits_of(self, name: str) -> int | None:
        """How many bits the tensor of this name ("layers.0.attention.wq.weight") gets; None where it stays as it is."""
        kind = name.removesuffix(".weight").split(".")[-1]
        if kind.endswith("norm"):
            return None
        return 8 if kind in ("tok_embeddings", "output") else self.bits

    def group_for(self, name: str, columns: int) -> int:
        """The group for a tensor's rows: the scheme's, halved until it divides them. Raises RequestError where none does."""
        group = self.group
        while columns % group and group > GROUPS[0]:
            group //= 2
        if columns % group:
            raise RequestError(
                f"{name} has rows of {columns:,}, which groups of {', '.join(map(str, GROUPS))} do not divide: take int8"
                " (or another number of processes)"
            )
        return group

    def to_params(self) -> dict[str, Any]:
        """What params.json says of it under "quantization"; `from_params` reads it back."""
        return {"scheme": f"int{self.bits}"} | ({"group": self.group} if self.bits == 4 else {})

    @classmethod
    def from_params(cls, value: Any) -> "Scheme":
        """Raises CheckpointError for what `to_params` never wrote."""
        section = value if isinstance(value, Mapping) else {}
        bits = {"int8": 8, "int4": 4}.get(section.get("scheme")) if isinstance(section.get("scheme"), str) else None
        group = section.get("group")
        is_group = type(group) is int and group in GROUPS if bits == 4 else group is None
        if bits is None or not is_group:
            raise CheckpointError(
                f'"quantization" is {value!r:.80}, expected "scheme" int8, or int4 with a "group" of one of '
                f"{', '.join(map(str, GROUPS))}; was it written by another program?"
            )
        return cls(bits, group)
