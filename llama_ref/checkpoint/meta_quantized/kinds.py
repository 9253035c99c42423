"""The kinds of releases (bf16, int4, fp8, int8) and their tensors; does not import torch."""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.shapes import (
    EMBEDDING,
    FP8,
    OUTPUT,
    WEIGHT_DTYPES,
    DtypeAndShape,
    Expected,
    Shape,
    expected_shapes,
    expected_tensors,
    misfit,
    strangers,
)
from llama_ref.errors import CheckpointError
from llama_ref.formatting import short

INT4_SCHEME = "int4_weight_int8_dynamic_activation"  # the only one of Meta's code
INT4_GROUP = 32  # of Meta's releases; their list of models says 256, but the file sizes imply 32
SCALES_NAME = re.compile(r"fp8_scales_(0|[1-9][0-9]{0,2})\.pt")
SCALE_KEY = re.compile(r"\d+_feed_forward\.w[123]_\d+")  # `scale_key`
LARGEST_SCALE = 1e6  # of an adaptor; the releases have 2


class Kind(Enum):
    """How a release stores its matrices."""

    PLAIN = "bf16"
    INT4 = "int4"  # Llama 3.2 1B and 3B, SpinQuant and QLoRA
    FP8 = "fp8"  # Llama 3.1 405B
    INT8 = "int8"  # Llama Guard 3 8B, by bitsandbytes


KIND_OF_WEIGHTS = {"bf16": Kind.PLAIN, "int4": Kind.INT4, "fp8-mixed": Kind.FP8, "int8": Kind.INT8}  # by Release.weights
ROUNDED = (Kind.INT4, Kind.FP8)  # those whose reference rounds the inputs of matrices


def kind_of(args: ModelArgs, folder: Path | None = None) -> Kind:
    """The kind of a folder in Meta's format; only the files in `folder` show an fp8 release."""
    if args.quantization_args is not None or args.lora_args is not None:
        return Kind.INT4
    has_scales = folder is not None and any(scales_number(path.name) >= 0 and path.is_file() for path in folder.iterdir())
    return Kind.FP8 if has_scales else Kind.PLAIN


@dataclass(frozen=True)
class Int4Params:
    """The quantization sections of an int4 release's params.json.

    `group`: the number of inputs that share a scale. `rotates`: the inputs of w2 are rotated
    (SpinQuant). `rank` and `low_rank_scale` describe QLoRA's adaptors; without them rank is 0.
    """

    group: int = INT4_GROUP
    rotates: bool = False
    rank: int = 0
    low_rank_scale: float = 0.0

    @classmethod
    def from_args(cls, args: ModelArgs) -> "Int4Params":
        """Read the sections. Raises CheckpointError naming a wrong value.

        Unknown keys are ignored; those of quantization_args may be missing, those of lora_args not.
        """
        usual = {"scheme": INT4_SCHEME, "group_size": INT4_GROUP, "spinquant": False}
        given = {key: value for key, value in (args.quantization_args or {}).items() if value is not None}
        scheme, group, rotates = ((usual | given)[key] for key in usual)
        lora, widths = args.lora_args, (args.dim, args.n_heads * args.head_dim, args.ffn_dim)
        if scheme != INT4_SCHEME:
            raise _wrong("quantization_args", "scheme", scheme, INT4_SCHEME)
        if type(group) is not int or group < 2 or group % 2:
            raise _wrong("quantization_args", "group_size", group, "an even number")
        if any(width % group for width in widths):
            named = ", ".join(f"{width:,}" for width in dict.fromkeys(widths))
            raise _wrong("quantization_args", "group_size", group, f"a divisor of the matrices' inputs ({named})")
        if type(rotates) is not bool:
            raise _wrong("quantization_args", "spinquant", rotates, "true or false")
        if rotates and args.ffn_dim & (args.ffn_dim - 1):
            raise CheckpointError(
                f'"spinquant" rotates the feed-forward width, which must be a power of two for that, but is {args.ffn_dim:,}'
            )
        if lora is None:
            return cls(group, rotates)
        rank, scale = lora.get("rank"), lora.get("scale")
        if type(rank) is not int or not 1 <= rank <= args.dim:
            raise _wrong("lora_args", "rank", rank, f"a whole number from 1 to {args.dim:,}")
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= LARGEST_SCALE:
            raise _wrong("lora_args", "scale", scale, f"a number of at most {LARGEST_SCALE:,.0f}")
        return cls(group, rotates, rank, float(scale))

    def __str__(self) -> str:
        how = "SpinQuant" if self.rotates else f"QLoRA, rank {self.rank}" if self.rank else "no rotation"
        return f"int4 ({how}), groups of {self.group}"


def _wrong(section: str, key: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(f'"{section}" has "{key}" {short(value)}, expected {expected}')


def tensors_of(args: ModelArgs, kind: Kind) -> dict[str, Expected]:
    """The tensors of a release's shards, in the model's order.

    Raises CheckpointError for a params.json whose sections cannot be used.
    """
    if kind is not Kind.PLAIN and args.has_vision:
        raise CheckpointError(f"it is a vision release in {kind.value}, which Meta has not published; it is not supported")
    if kind is Kind.INT4:
        return _int4_tensors(args, Int4Params.from_args(args))
    if kind is Kind.INT8:
        return _int8_tensors(args)
    if kind is Kind.FP8:
        shapes = expected_shapes(args)
        return {name: Expected(shape, (FP8,) if is_fp8(name, args) else WEIGHT_DTYPES) for name, shape in shapes.items()}
    return expected_tensors(args)


def _int4_tensors(args: ModelArgs, params: Int4Params) -> dict[str, Expected]:
    out = {}
    for name, shape in expected_shapes(args).items():
        if len(shape) == 1:
            out[name] = Expected(shape)
            continue
        stem, (rows, columns) = name.removesuffix(".weight"), shape
        out[name] = Expected(shape, ("int8",))
        if name in (EMBEDDING, OUTPUT):
            out[f"{stem}.scales"] = Expected((rows, 1), is_column=True)
            continue
        groups = (rows, columns // params.group)
        out[f"{stem}.scales"], out[f"{stem}.zeros"] = Expected(groups), Expected(groups, is_optional=True)
        if params.rank:
            out[f"{stem}.adaptor.A.weight"] = Expected((params.rank, columns))
            out[f"{stem}.adaptor.B.weight"] = Expected((rows, params.rank))
    return out


def _int8_tensors(args: ModelArgs) -> dict[str, Expected]:
    out = {}
    for name, shape in expected_shapes(args).items():
        if len(shape) == 1 or name in (EMBEDDING, OUTPUT):
            out[name] = Expected(shape, may_be_tied=name == OUTPUT)
            continue
        stem = name.removesuffix(".weight")
        out[name], out[f"{stem}.SCB"] = Expected(shape, ("int8",)), Expected((shape[0], 1), ("float32",), is_column=True)
        out[f"{stem}.weight_format"] = Expected((), ("uint8",), is_optional=True)
    return out


def value_range(name: str, dtype: str) -> tuple[float, float] | None:
    """The smallest and largest value that the loader accepts in a quantized tensor; None: any."""
    if name.startswith("layers.") and name.endswith(".weight") and dtype == "int8":
        return -8, 7
    if name.endswith((".scales", ".SCB")):
        return 0, math.inf
    if name.endswith(".weight_format"):
        return 0, 0
    return (sys.float_info.min, math.inf) if SCALE_KEY.fullmatch(name) else None


def contradiction(tensors: Mapping[str, DtypeAndShape], args: ModelArgs, kind: Kind) -> str | None:
    """Why a shard's tensors cannot be those of this kind of release; else None."""
    dtypes = {dtype for dtype, _ in tensors.values()}
    scales = {name: shape for name, (_, shape) in tensors.items() if name.endswith(".scales")}
    if not args.has_vision and any(name.startswith(("text_model.", "vision_model.")) for name in tensors):
        return (
            "it holds a vision model, but params.json has no vision_chunk_size and vision_num_cross_attention_layers: fetch "
            "the params.json of the vision release"
        )
    if args.has_vision and EMBEDDING in tensors and not any(name.startswith("vision_model.") for name in tensors):
        return (
            "it holds a text model only, but params.json has the keys of a vision release: fetch the params.json or the "
            "weights of the other release"
        )
    sections = " and ".join(key for key in ("quantization_args", "lora_args") if getattr(args, key) is not None)
    if kind is Kind.FP8 and FP8 not in dtypes and any(is_fp8(name, args) for name in tensors):
        return (
            "it holds no float8 matrices, but files with their scales are here (fp8_scales_0.pt and so on): remove these, or "
            "fetch the shards of the fp8 release"
        )
    if kind is Kind.PLAIN and FP8 in dtypes:
        return "it holds float8 matrices, as Meta's fp8 releases do, but no scales are here: fetch fp8_scales_0.pt and so on"
    if kind is Kind.PLAIN and scales:
        return (
            "it holds int8 matrices with scales, as Meta's int4 releases do, but params.json has no quantization_args: "
            "fetch the params.json of that release"
        )
    if kind is Kind.INT4 and not scales:
        return f"params.json has {sections}, as Meta's int4 releases do, but no matrix has its scales here" + (
            ": fetch the weights again" if "int8" in dtypes else ": fetch the params.json of these weights' release"
        )
    if kind is Kind.INT4 and args.lora_args is None and any(".adaptor." in name for name in tensors):
        return "it holds adaptors of low rank (QLoRA), but params.json has no lora_args: fetch the params.json of that release"
    return _other_group(scales, args) if kind is Kind.INT4 else None


def _other_group(scales: Mapping[str, Shape], args: ModelArgs) -> str | None:
    found = {
        args.dim / shape[1] for name, shape in scales.items() if name.endswith(("w1.scales", "w3.scales")) and shape[1:2] > (0,)
    }
    group = Int4Params.from_args(args).group
    if len(found) != 1 or found == {group}:
        return None
    return (
        f'"quantization_args" in params.json has "group_size" {group}, but the scales are those of groups of {found.pop():g}: '
        "fetch both files from the same release"
    )


def is_fp8(name: str, args: ModelArgs) -> bool:
    """Whether an fp8 release stores this tensor in float8: the feed-forward of all layers but the first and the last."""
    parts = name.split(".")
    return parts[0] == "layers" and parts[2] == "feed_forward" and 0 < int(parts[1]) < args.n_layers - 1


def scales_name(shard: int) -> str:
    """The file with the scales of one shard's float8 matrices."""
    return f"fp8_scales_{shard}.pt"


def scales_number(name: str) -> int:
    """The shard's number in such a file's name; -1 for any other file."""
    match = SCALES_NAME.fullmatch(name)
    return int(match[1]) if match else -1


def scale_key(name: str, shard: int) -> str:
    """A matrix's key in that file: ("layers.3.feed_forward.w1.weight", 5) -> "3_feed_forward.w1_5"."""
    _, layer, rest = name.removesuffix(".weight").split(".", 2)
    return f"{layer}_{rest}_{shard}"


def wrong_scales(found: Mapping[str, DtypeAndShape], args: ModelArgs, shard: int, n_shards: int) -> list[str]:
    """The problems with a shard's file of scales, which has one scale per row of its matrices."""
    shards = {key.rpartition("_")[2] for key in found}
    if len(shards) == 1 and shards != {str(shard)}:
        other = shards.pop()[:20]
        return [f"it holds the scales of shard {other}, expected those of shard {shard}; fetch it again under its own name"]
    expected = {}
    for name, (rows, *_) in expected_shapes(args).items():
        if is_fp8(name, args):
            own_rows = rows if name.endswith("w2.weight") else rows // n_shards
            expected[scale_key(name, shard)] = Expected((own_rows, 1), ("float32",), is_column=True)
    problems = [problem for key, whole in expected.items() if (problem := misfit(key, found.get(key), whole))]
    return problems + [f"{key} is unexpected" for key in strangers(found, expected)]
