"""`--steer`: add a control vector to a model's residual stream during generation."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

from llama_ref.cli.parsing.flags import Flag
from llama_ref.errors import RequestError

if TYPE_CHECKING:
    from llama_ref.generation import Llama

Steer = Annotated[
    str | None,
    Flag("add this control vector (GGUF) to the residual stream, as in v.gguf:0.8@10-20", metavar="FILE:SCALE@LAYERS"),
]
WORD = re.compile(r"(?P<file>.+?)(?::(?P<scale>[+-]?\d+(?:\.\d*)?))?(?:@(?P<layers>\d+(?:[,-]\d+)*))?", re.DOTALL)
MOST_LAYERS = 10_000


@contextmanager
def steering(llama: "Llama", word: str | None) -> Iterator[None]:
    """Inside this context, steer a model as --steer says. Raises RequestError, CheckpointError."""
    if word is None:
        yield
        return
    from llama_ref.study.directions.control_vector import read_control_vector
    from llama_ref.study.directions.steering import steer

    file, scale, layers = parse(word)
    with steer(llama.model, read_control_vector(file), scale, layers):
        yield


def parse(word: str) -> tuple[str, float, list[int] | None]:
    """Parse FILE:SCALE@LAYERS; layers None means all in the file. Raises RequestError."""
    found = WORD.fullmatch(word)
    if found is None:
        raise RequestError(f"--steer is {word!r:.60}, expected FILE, FILE:SCALE or FILE:SCALE@LAYERS, as in v.gguf:0.8@10-20")
    layers = found["layers"] and [layer for part in found["layers"].split(",") for layer in _range(word, part)]
    return found["file"], float(found["scale"] or 1), layers or None


def _range(word: str, part: str) -> range:
    """Parse one layer or a range, such as 7 or 10-20."""
    ends = [int(end[:9]) for end in part.split("-")]
    if len(ends) > 2 or ends[-1] < ends[0] or ends[-1] > MOST_LAYERS:
        raise RequestError(f"--steer has the layers {part!r:.40} in {word!r:.60}, expected a number or a range such as 10-20")
    return range(ends[0], ends[-1] + 1)
