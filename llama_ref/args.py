"""Read and check params.json, the shape and constants of a model."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llama_ref.files import BadValue, json_object, renamed_keys, require_keys
from llama_ref.formatting import short

PARAMS_LIMIT_BYTES = 1 << 20  # real files have about 200
MOST_LAYERS = 10_000  # the largest Llama 3 has 126; a damaged number must not build modules for hours
WIDEST = 1 << 28  # limit of any dimension; a WIDEST x WIDEST matrix's size still fits in 64 bits

# The 3.2 1B and 3B scale RoPE by 32, every other Llama 3.1+ by 8. Meta's params.json does not say
# so (llama-models issues 166 and 241). Depth is left out, because a pruned 1B is still a 1B.
SHAPES_SCALED_BY_32 = {(2048, 32, 8), (3072, 24, 8)}  # (dim, n_heads, n_kv_heads)

# RoPE scaling, as in `apply_scaling` of Meta's llama-models: frequencies whose wavelength exceeds
# the original training context are divided by the factor, those with a wavelength below a quarter
# of it are kept, and those between are interpolated.
ORIGINAL_CONTEXT = 8192  # tokens
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR = 1, 4

REQUIRED = ("dim", "n_layers", "n_heads", "vocab_size", "norm_eps", "rope_theta")
POSITIVE_INTEGERS = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "hidden_dim", "head_dim"),
    *("vision_chunk_size", "vision_max_num_chunks", "vision_num_cross_attention_layers"),
    *("vision_dim", "vision_n_layers", "vision_n_global_layers", "vision_n_heads"),
)
POSITIVE_NUMBERS = ("ffn_dim_multiplier", "norm_eps", "rope_theta", "rope_scaling_factor")
SECTIONS = ("quantization_args", "lora_args")
OTHER_NAMES = {"rope_freq_base": "rope_theta"}  # as the int4 guard's params.json spells it

N_LEARNABLE = 8  # embeddings after the vocabulary; only the first is used, for the image token
PATCH_SIZE = 14  # side of a patch in pixels, in every vision release
TOKENS_MULTIPLE = 8  # Meta's encoder pads a tile's tokens to a multiple, and attends to the padding
MOST_TILES = 64  # per image; the releases have 4


@dataclass(frozen=True)
class ModelArgs:
    """A Llama 3's shape and constants, named as in params.json.

    `rope_scaling_factor` is 1 if and only if `use_scaled_rope` is false. Keys without a field are
    kept in `extra`.
    """

    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    n_kv_heads: int
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    hidden_dim: int | None = None  # FFN width; only pruned models need it
    head_dim: int = 0  # default: dim / n_heads; only models other than Meta's give it
    use_scaled_rope: bool = False
    rope_scaling_factor: float = 1.0
    vision_chunk_size: int | None = None  # side of a tile in pixels
    vision_max_num_chunks: int = 4  # most tiles per image
    vision_num_cross_attention_layers: int | None = None
    # The encoder's shape, which Meta's files omit: it is the same in all releases.
    vision_dim: int = 1280
    vision_n_layers: int = 32
    vision_n_global_layers: int = 8
    vision_n_heads: int = 16
    vision_kept_layers: tuple[int, ...] = (3, 7, 15, 23, 30)  # their inputs are part of the output
    quantization_args: Mapping[str, Any] | None = field(default=None, hash=False)
    lora_args: Mapping[str, Any] | None = field(default=None, hash=False)
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward layer: `hidden_dim` if given, else Meta's formula."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        return ffn_dim(self.dim, self.multiple_of, self.ffn_dim_multiplier)

    @property
    def has_vision(self) -> bool:
        """Whether the model reads images."""
        return self.vision_num_cross_attention_layers is not None

    def text_only(self) -> "ModelArgs":
        """These arguments without vision: the text model alone."""
        return replace(self, vision_chunk_size=None, vision_num_cross_attention_layers=None)

    @property
    def cross_layers(self) -> list[int]:
        """Layers preceded by a cross-attention layer: every k-th, counted back from the last.

        As in Meta's `_init_fusion_schedule`: 8 of 32 layers are 3, 7, …, 31. Some shapes give fewer
        layers than asked for.
        """
        n = self.vision_num_cross_attention_layers
        return [] if n is None else list(range(self.n_layers))[:: -math.ceil(self.n_layers / n)][:n][::-1]

    @property
    def patches_per_tile(self) -> int:
        """Vision tokens per tile: its patches and one class token (1601 at 560 pixels)."""
        return ((self.vision_chunk_size or 0) // PATCH_SIZE) ** 2 + 1

    @classmethod
    def from_json(cls, path: str | Path, *, rope_scaling_factor: float | None = None) -> "ModelArgs":
        """Read params.json. Raises CheckpointError naming a missing, mistyped or contradictory key.

        `rope_scaling_factor` overrides the file's key of that name, which overrides the default of
        the shape (32 for the 3.2 1B and 3B, else 8).
        """
        with json_object(path, "the model's params.json", "dim, n_layers, n_heads, …", PARAMS_LIMIT_BYTES) as params:
            return cls.from_dict(params, rope_scaling_factor=rope_scaling_factor)

    @classmethod
    def from_dict(
        cls,
        params: Mapping[str, Any],
        *,
        rope_scaling_factor: float | None = None,
        names: Mapping[str, str] | None = None,
    ) -> "ModelArgs":
        """Read an already parsed params.json. Raises CheckpointError.

        `names` maps keys to the names that errors should use, for values from another kind of file.
        """
        given = params
        params, names = renamed_keys(params.items(), OTHER_NAMES), _Names(names or {})
        _flatten_adapter(params)
        _require_params(params, given)
        params.setdefault("n_kv_heads", params["n_heads"])
        params.setdefault("use_scaled_rope", False)
        if rope_scaling_factor is not None:
            params["rope_scaling_factor"] = rope_scaling_factor
        _check_types(params, names)
        _check_agreement(params, names)
        if not params["use_scaled_rope"]:
            params["rope_scaling_factor"] = 1.0
        elif "rope_scaling_factor" not in params:
            params["rope_scaling_factor"] = usual_rope_factor(params["dim"], params["n_heads"], params["n_kv_heads"])
        if "vision_kept_layers" in params:
            params["vision_kept_layers"] = tuple(params["vision_kept_layers"])
        known = {key: params.pop(key) for key in cls.__dataclass_fields__ if key in params and key != "extra"}
        return cls(**known, extra=params)


def ffn_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's formula: 2/3 of 4·dim, scaled, rounded up to a multiple. The truncations matter."""
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * math.ceil(width / multiple_of)


def usual_rope_factor(dim: int, n_heads: int, n_kv_heads: int) -> float:
    """The RoPE scaling factor of this shape if params.json does not give it."""
    return 32.0 if (dim, n_heads, n_kv_heads) in SHAPES_SCALED_BY_32 else 8.0


class _Names(dict):
    """Names of keys for error messages; a key without an entry keeps its name."""

    def __missing__(self, key: str) -> str:
        return key


def _flatten_adapter(params: dict[str, Any]) -> None:
    """Copy the number of cross-attention layers from the section that Meta's code also reads."""
    section: Any = params.get("vision_model")
    for key in ("cross_attention_adapter", "num_layers"):
        section = section.get(key) if isinstance(section, dict) else None
    if section is not None:
        params.setdefault("vision_num_cross_attention_layers", section)


def _require_params(params: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    require_keys(params, REQUIRED if "hidden_dim" in params else (*REQUIRED, "multiple_of"), given)


def _check_types(params: dict[str, Any], names: Mapping[str, str]) -> None:
    for key in POSITIVE_INTEGERS:
        value = params.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= WIDEST:
            raise BadValue(f'"{names[key]}" is {short(value)}, expected a whole number from 1 to {WIDEST:,}')
    if params["n_layers"] > MOST_LAYERS:
        raise BadValue(f'"{names["n_layers"]}" is {params["n_layers"]:,}, expected at most {MOST_LAYERS:,}')
    for key in POSITIVE_NUMBERS:
        value = params.get(key, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise BadValue(f'"{names[key]}" is {short(value)}, expected a positive number')
        if key in params:
            params[key] = float(value)
    if not isinstance(params["use_scaled_rope"], bool):
        raise BadValue(f'"use_scaled_rope" is {short(params["use_scaled_rope"])}, expected true or false')
    for key in SECTIONS:
        if not isinstance(params.get(key, {}), dict):
            raise BadValue(f'"{key}" is {short(params[key])}, expected an object')


def _check_agreement(params: Mapping[str, Any], names: Mapping[str, str]) -> None:
    dim, n_heads, n_kv_heads = params["dim"], params["n_heads"], params["n_kv_heads"]
    if "head_dim" not in params and dim % n_heads:
        raise BadValue(f'"{names["dim"]}" {dim} is not a multiple of "{names["n_heads"]}" {n_heads}')
    head_dim = params.get("head_dim", dim // n_heads)
    if head_dim % 2:
        given = f'"{names["head_dim"]}"' if "head_dim" in params else f'"{names["dim"]}" {dim} / "{names["n_heads"]}" {n_heads}'
        raise BadValue(f"{given} gives a head of odd width {head_dim}, which RoPE cannot rotate")
    if n_heads * head_dim > WIDEST:
        raise BadValue(f'"{names["n_heads"]}" {n_heads} and "{names["head_dim"]}" {head_dim} give heads wider than {WIDEST:,}')
    if n_heads % n_kv_heads:
        raise BadValue(f'"{names["n_heads"]}" {n_heads} is not a multiple of "{names["n_kv_heads"]}" {n_kv_heads}')
    if params.get("rope_scaling_factor", 1.0) < 1:
        raise BadValue(f'"{names["rope_scaling_factor"]}" is {params["rope_scaling_factor"]}, expected 1 or more')
    if "multiple_of" in params:
        _check_ffn_dim(params)
    if "vision_num_cross_attention_layers" in params or "vision_chunk_size" in params:
        _check_vision(params, names)


def _check_vision(params: Mapping[str, Any], names: Mapping[str, str]) -> None:
    for key in ("vision_chunk_size", "vision_num_cross_attention_layers"):
        if key not in params:
            raise BadValue(f'"{names[key]}" is missing, which a model that reads images needs')
    whole: dict[str, Any] = {key: field.default for key, field in ModelArgs.__dataclass_fields__.items()} | dict(params)
    tile, dim, n_heads, kept = (whole[f"vision_{key}"] for key in ("chunk_size", "dim", "n_heads", "kept_layers"))
    if tile % PATCH_SIZE or tile > 10_000:
        raise BadValue(f'"{names["vision_chunk_size"]}" is {tile}, expected a multiple of {PATCH_SIZE} up to 10,000')
    if whole["vision_max_num_chunks"] > MOST_TILES:
        raise BadValue(f'"{names["vision_max_num_chunks"]}" is {whole["vision_max_num_chunks"]}, expected at most {MOST_TILES}')
    if whole["vision_num_cross_attention_layers"] > whole["n_layers"]:
        found = f'"{names["vision_num_cross_attention_layers"]}" is {whole["vision_num_cross_attention_layers"]}'
        raise BadValue(f'{found}, expected at most "{names["n_layers"]}", {whole["n_layers"]}')
    if dim % n_heads:
        raise BadValue(f'"{names["vision_dim"]}" {dim} is not a multiple of "{names["vision_n_heads"]}" {n_heads}')
    for key in ("vision_n_layers", "vision_n_global_layers"):
        if whole[key] > MOST_LAYERS:
            raise BadValue(f'"{names[key]}" is {whole[key]:,}, expected at most {MOST_LAYERS:,}')
    numbers = range(whole["vision_n_layers"])
    if not isinstance(kept, list | tuple) or not all(type(layer) is int and layer in numbers for layer in kept):
        raise BadValue(
            f'"{names["vision_kept_layers"]}" is {short(kept)}, expected numbers of the {len(numbers)} encoder layers'
        )


def _check_ffn_dim(params: Mapping[str, Any]) -> None:
    multiplier = params.get("ffn_dim_multiplier", 1.0)
    width = 0 if multiplier > WIDEST else ffn_dim(params["dim"], params["multiple_of"], multiplier)
    if not 0 < width <= WIDEST:
        raise BadValue(f'"dim" {params["dim"]} and "ffn_dim_multiplier" {multiplier:g} give an impossible feed-forward width')
    if params.get("hidden_dim", width) != width:
        raise BadValue(f'"hidden_dim" is {params["hidden_dim"]}, but "multiple_of" and "ffn_dim_multiplier" give {width}')
