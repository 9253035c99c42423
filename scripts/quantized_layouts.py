"""Weights in the layouts of Meta's quantized releases, rounded to nearest.

For random checkpoints and for measurements: Meta's own files were rounded more carefully.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from llama_ref.checkpoint.formats.lazy_tensor import LazyTensor
from llama_ref.checkpoint.hf.bitsandbytes import name_in_files
from llama_ref.checkpoint.meta_quantized.kinds import scale_key
from llama_ref.checkpoint.shapes import EMBEDDING, OUTPUT, Expected
from llama_ref.quantization.rounded_inputs import FP8_FINEST, FP8_LARGEST

Draw = Callable[[str], Iterator[Tensor]]  # a tensor's rows in float32, block by block, the same each time


def int4_tensors(expected: Mapping[str, Expected], draw: Draw, dtype: torch.dtype) -> list[LazyTensor]:
    """The tensors of an int4 release, as in `kinds.tensors_of`; unquantized ones in `dtype`."""
    return [_int4_tensor(name, tensor, expected, draw, dtype) for name, tensor in expected.items() if not tensor.is_optional]


def _int4_tensor(name: str, tensor: Expected, expected: Mapping[str, Expected], draw: Draw, dtype: torch.dtype) -> LazyTensor:
    stem = name.removesuffix(".scales").removesuffix(".weight")
    if f"{stem}.scales" not in expected:  # a norm, or a low-rank factor
        return LazyTensor(name, tensor.shape, dtype, partial(cast_rows, draw, name, dtype))
    weight, groups = f"{stem}.weight", expected[f"{stem}.scales"].shape[1]
    largest = 127 if weight in (EMBEDDING, OUTPUT) else 7
    if name == weight:
        return LazyTensor(name, tensor.shape, torch.int8, lambda: (_rounded(rows, groups, largest)[0] for rows in draw(weight)))
    return LazyTensor(name, tensor.shape, torch.float32, lambda: (_rounded(rows, groups, largest)[1] for rows in draw(weight)))


def _rounded(rows: Tensor, groups: int, largest: int) -> tuple[Tensor, Tensor]:
    """float32 (n, K) -> int8 (n, K) and a scale per group, float32 (n, groups)."""
    grouped = rows.unflatten(1, (groups, -1))
    scale = grouped.abs().amax(-1).clamp(min=1e-12) / largest
    return (grouped / scale[..., None]).round().clamp(-largest - 1, largest).to(torch.int8).flatten(1), scale


def int8_tensors(expected: Mapping[str, Expected], draw: Draw, dtype: torch.dtype) -> list[LazyTensor]:
    """The tensors of an int8 release, as from bitsandbytes, with rows in the order of `draw`."""
    out = []
    for name, (shape, dtypes, *_) in expected.items():
        if name.endswith(".SCB"):
            weight = f"{name.removesuffix('.SCB')}.weight"
            out.append(LazyTensor(name_in_files(name), shape[:1], torch.float32, partial(_int8, draw, weight, 1)))
        elif "int8" in dtypes:
            out.append(LazyTensor(name_in_files(name), shape, torch.int8, partial(_int8, draw, name, 0)))
        elif shape:  # not weight_format, which may be left out
            out.append(LazyTensor(name_in_files(name), shape, dtype, partial(cast_rows, draw, name, dtype)))
    return out


def _int8(draw: Draw, name: str, part: int) -> Iterator[Tensor]:
    """Part 0, a matrix in int8, or part 1, the largest absolute value of each row."""
    for rows in draw(name):
        largest = rows.abs().amax(1)
        yield (rows * (127 / largest[:, None])).round().to(torch.int8) if part == 0 else largest


def fp8_tensors(
    expected: Mapping[str, Expected], draw: Draw, dtype: torch.dtype, rank: int
) -> tuple[list[LazyTensor], list[LazyTensor]]:
    """The tensors of an fp8 release's shard, with the shapes in `expected`, and its scales."""
    shard, scales = [], []
    for name, (shape, dtypes, *_) in expected.items():
        if "float8_e4m3fn" not in dtypes:
            shard.append(LazyTensor(name, shape, dtype, partial(cast_rows, draw, name, dtype)))
            continue
        shard.append(LazyTensor(name, shape, torch.float8_e4m3fn, partial(_fp8, draw, name, 0)))
        scales.append(LazyTensor(scale_key(name, rank), shape[:1], torch.float32, partial(_fp8, draw, name, 1)))
    return shard, scales


def cast_rows(draw: Draw, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
    return (rows.to(dtype) for rows in draw(name))


def _fp8(draw: Draw, name: str, part: int) -> Iterator[Tensor]:
    """Part 0, a matrix in float8, or part 1, its scales."""
    for rows in draw(name):
        scale = (rows.abs().amax(1) / FP8_LARGEST).clamp(min=FP8_FINEST)
        yield (rows / scale[:, None]).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn) if part == 0 else scale
