"""Llama Guard 3 8B in eight bits: a Hugging Face folder that bitsandbytes wrote (LLM.int8()).

The layers' matrices are int8, with one value per row, SCB, its largest absolute weight:
w = weight · SCB / 127. Meta's download has no config.json.
"""

from collections.abc import Collection, Mapping

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.hf.names import hf_name
from llama_ref.checkpoint.meta_quantized.kinds import Kind, tensors_of
from llama_ref.checkpoint.releases import RELEASES
from llama_ref.checkpoint.shapes import DtypeAndShape, misfit

GUARD = "Llama-Guard-3-8B:int8"


def is_int8(names: Collection[str]) -> bool:
    """Whether these tensor names are those of an int8 folder."""
    return any(name.endswith(".SCB") for name in names)


def guard_args() -> ModelArgs:
    """The shape of the only release of this kind, for folders without a config.json."""
    return ModelArgs.from_dict(RELEASES[GUARD].params)


def is_guard(tensors: Mapping[str, DtypeAndShape]) -> bool:
    """Whether all of a file's tensors belong to the int8 release of Llama Guard 3 8B."""
    expected = {name_in_files(name): tensor for name, tensor in tensors_of(guard_args(), Kind.INT8).items()}
    return is_int8(tensors) and all(
        name in expected and misfit(name, found, expected[name]) is None for name, found in tensors.items()
    )


def name_in_files(name: str) -> str:
    """Hugging Face's name of a tensor, scales included ("layers.3.attention.wq.SCB")."""
    stem, _, part = name.rpartition(".")
    return hf_name(f"{stem}.weight").removesuffix("weight") + part
