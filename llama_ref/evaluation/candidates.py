"""The models to measure: checkpoints, optionally quantized while they are loaded."""

import re
from dataclasses import dataclass
from pathlib import Path

from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.spelling import model_name
from llama_ref.errors import RequestError
from llama_ref.plan import find_model
from llama_ref.quantization.scheme import Scheme


@dataclass(frozen=True)
class Candidate:
    """A checkpoint, by name or path, and the scheme to quantize it to while loading, if any."""

    name: str
    quantize: str | None

    @property
    def label(self) -> str:
        """The name in a table: "Llama3.2-1B, int4"."""
        shown = model_name(open_folder(self.name).path.resolve())
        return f"{shown}, {self.quantize}" if self.quantize else shown


def candidates(name: str, quantize: str | None, against: str | None) -> list[Candidate]:
    """The model `name`, and those in `against`: checkpoints, or schemes for `name`.

    Example of `against`: "int4,Llama3.2-1B". Raises RequestError or CheckpointError if one cannot
    be loaded.
    """
    found = [Candidate(name, quantize and str(Scheme.parse(quantize)))]
    for word in (each.strip() for each in (against or "").split(",")):
        if re.match(r"int\d", word) and not Path(word).exists():
            found.append(Candidate(name, str(Scheme.parse(word, "against"))))
        elif word:
            found.append(Candidate(word, found[0].quantize))
        elif against is not None:
            raise RequestError(f"against is {against!r:.60}, expected names or schemes separated by commas, like int8,int4")
    for each in found:
        folder = open_folder(each.name)
        if each.quantize and folder.is_quantized:
            raise RequestError(f"{each.name} is quantized: compare its source folder with {each.quantize}")
    return list(dict.fromkeys(found))


def shortest_context(models: list[Candidate]) -> int:
    """The smallest context length of the models, in tokens."""
    return min(find_model(each.name).context for each in models)
