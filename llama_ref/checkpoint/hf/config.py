"""Convert config.json to ModelArgs and back, and to an equivalent params.json."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_ref.args import (
    HIGH_FREQ_FACTOR,
    LOW_FREQ_FACTOR,
    ORIGINAL_CONTEXT,
    PARAMS_LIMIT_BYTES,
    ModelArgs,
    ffn_dim,
    usual_rope_factor,
)
from llama_ref.checkpoint.hf.allowed import expect
from llama_ref.checkpoint.hf.vision.config import (
    VISION_MODEL,
    VISION_NAMES,
    check_vision_sections,
    text_section,
    vision_params,
)
from llama_ref.checkpoint.releases import SHAPES
from llama_ref.errors import UnsupportedModel
from llama_ref.files import BadValue, json_object, renamed_keys, require_keys
from llama_ref.formatting import dtype_name, short

if TYPE_CHECKING:
    import torch

NAMES = {  # ModelArgs' name: Hugging Face's
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "head_dim": "head_dim",
}
OPTIONAL = ("num_key_value_heads", "head_dim")
REQUIRED = (*(key for key in NAMES.values() if key not in OPTIONAL), "model_type")

# Up to version 4, transformers wrote rope_theta and, for scaled RoPE, a section rope_scaling (with
# rope_type, formerly type). Since version 5 it writes one section with everything.
ROPE_SECTIONS = ("rope_scaling", "rope_parameters")
# These keys are also allowed outside of the sections.
ROPE_KEYS = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")
OLD_ROPE_KEYS = {"type": "rope_type"}
LLAMA_3_ROPE = {
    "low_freq_factor": float(LOW_FREQ_FACTOR),  # transformers 4 warns about ints
    "high_freq_factor": float(HIGH_FREQ_FACTOR),
    "original_max_position_embeddings": ORIGINAL_CONTEXT,
}

ALLOWED = (  # key, the values of a Llama 3 (the first is the default), why no other is possible
    ("architectures", (["LlamaForCausalLM"],), "no other class has an output over the vocabulary"),
    ("hidden_act", ("silu", "swish"), "Llama 3's feed-forward layers use SiLU"),
    ("attention_bias", (False,), "Llama 3's projections have no biases"),
    ("mlp_bias", (False,), "Llama 3's projections have no biases"),
    ("tie_word_embeddings", (False, True), "it says whether output and embedding are one matrix"),
)
WHY = "its weights are quantized, which is not supported; fetch the unquantized model"
UNSUPPORTED = {  # keys that no Llama 3 has, and why they are rejected
    "sliding_window": "Llama 3's attention covers the whole context",
    "compression_config": WHY,
}
VISION_FIELDS = tuple(field.name for field in fields(ModelArgs) if field.name.startswith("vision_"))
# Always in Meta's params.json; the other keys are written only if they differ from its releases.
METAS_VISION_FIELDS = ("vision_chunk_size", "vision_max_num_chunks", "vision_num_cross_attention_layers")

LARGEST_MULTIPLE = 4096  # largest multiple_of of any release
LONG_CONTEXT, SHORT_CONTEXT = 131072, 8192  # tokens, of Llama 3.1 and later, and of 3.0


@dataclass(frozen=True)
class HFConfig:
    """The content of config.json. If `tied`, the output is the embedding and need not be stored."""

    args: ModelArgs
    tied: bool


def read_config(path: str | Path) -> HFConfig:
    """Read the config.json of a Llama 3, text or vision (mllama), as written by transformers 4 or 5.

    `args.hidden_dim` is always set, because config.json gives the FFN's width directly;
    `make_params` finds the formula. Raises CheckpointError if the file cannot be read or describes
    another architecture (UnsupportedModel), naming the key that shows it.
    """
    with json_object(path, "the model's config.json", "model_type, hidden_size, …", PARAMS_LIMIT_BYTES) as config:
        is_vision = config.get("model_type") == VISION_MODEL
        text = text_section(config) if is_vision else config
        _check_model(config, text)
        require_keys(text, REQUIRED)
        theta, factor = _read_rope(text)
        args = ModelArgs.from_dict(
            {name: text.get(key) for name, key in NAMES.items()}
            | {"rope_theta": theta, "use_scaled_rope": factor is not None, "rope_scaling_factor": factor}
            | (vision_params(config) if is_vision else {}),
            names=NAMES | VISION_NAMES | {"rope_scaling_factor": "factor"},
        )
        if is_vision:
            check_vision_sections(config, args)
        return HFConfig(args, tied=text.get("tie_word_embeddings") is True)


def _check_model(config: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Check what `ModelArgs` cannot express; `text` is the text model's section, or all of it."""
    expect(config, "model_type", ("llama", VISION_MODEL), "only Llama 3 models are supported")
    for key, allowed, why in ALLOWED:
        expect(text, key, allowed, why)
    quantization = config.get("quantization_config")
    if quantization is not None and (text is not config or not _is_int8(quantization)):
        int8 = ", or int8 by bitsandbytes" if text is config else ""
        raise UnsupportedModel(f'"quantization_config" is {short(quantization)}, expected none{int8}: {WHY}')
    for key, why in UNSUPPORTED.items():
        for section in (config, text):
            if section.get(key) is not None:
                raise UnsupportedModel(f'"{key}" is {short(section[key])}, expected none: {why}')


def _is_int8(quantization: object) -> bool:
    """Whether bitsandbytes' LLM.int8() wrote the weights, as in Llama-Guard-3-8B:int8."""
    section = quantization if isinstance(quantization, Mapping) else {}
    return section.get("quant_method") == "bitsandbytes" and section.get("load_in_8bit") is True


def _read_rope(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """(theta, factor); factor is None without scaling. Values given more than once must agree."""
    pairs = [(key, config.get(key)) for key in ROPE_KEYS]
    for name in ROPE_SECTIONS:
        section = config.get(name) or {}
        if not isinstance(section, dict):
            raise BadValue(f'"{name}" is {short(section)}, expected an object or null')
        pairs += section.items()
    rope = renamed_keys(pairs, OLD_ROPE_KEYS)
    require_keys(rope, ["rope_theta", *(["rope_type"] if "factor" in rope else [])], config)
    expect(rope, "partial_rotary_factor", (1.0,), "Llama 3's RoPE rotates whole heads")
    expect(rope, "rope_type", ("default", "llama3"), "Llama 3 uses no other RoPE scaling")
    if rope.get("rope_type", "default") == "default":
        return rope["rope_theta"], None
    require_keys(rope, ["factor", *LLAMA_3_ROPE])
    for key, usual in LLAMA_3_ROPE.items():
        expect(rope, key, (usual,), "every Llama 3.1 and later has this value")
    return rope["rope_theta"], rope["factor"]


def make_config(args: ModelArgs, *, tied: bool, dtype: "torch.dtype", bos: int, eos: Sequence[int]) -> dict[str, Any]:
    """The config.json of a text model, in transformers 4's keys, which 5 and vLLM also read.

    `bos` is the id of the first token of a text. `eos` are the ids that end one: one for a base
    model; end_of_text, eom_id and eot_id for an instruct model. `args.extra` is not written.
    """
    rope = {"rope_type": "llama3", "factor": args.rope_scaling_factor, **LLAMA_3_ROPE} if args.use_scaled_rope else None
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": one_or_several(eos),
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        "hidden_size": args.dim,
        "initializer_range": 0.02,
        "intermediate_size": args.ffn_dim,
        "max_position_embeddings": LONG_CONTEXT if args.use_scaled_rope else SHORT_CONTEXT,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": args.n_heads,
        "num_hidden_layers": args.n_layers,
        "num_key_value_heads": args.n_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": args.norm_eps,
        "rope_scaling": rope,
        "rope_theta": args.rope_theta,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype_name(dtype),
        "use_cache": True,
        "vocab_size": args.vocab_size,
    }


def make_generation_config(*, bos: int, eos: Sequence[int]) -> dict[str, Any]:
    """The generation_config.json of Meta's Hugging Face releases, base and instruct."""
    return {
        "bos_token_id": bos,
        "do_sample": True,
        "eos_token_id": one_or_several(eos),
        "temperature": 0.6,
        "top_p": 0.9,
    }


def one_or_several(ids: Sequence[int]) -> int | list[int]:
    """Ids as Hugging Face's files have them: a single one as a number."""
    return ids[0] if len(ids) == 1 else list(ids)


def make_params(args: ModelArgs) -> dict[str, Any]:
    """A model's params.json, with a formula for the FFN width, because Meta's code needs one.

    A release's shape gives that release's params. `rope_scaling_factor` is included only if the
    shape does not imply it.
    """
    multiple_of, multiplier = _ffn_formula(args)
    params: dict[str, Any] = {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "n_heads": args.n_heads,
        "n_kv_heads": args.n_kv_heads,
        "vocab_size": args.vocab_size,
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple_of,
        "norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
    }
    if multiplier is None:
        del params["ffn_dim_multiplier"]
    if args.head_dim != args.dim // args.n_heads:
        params["head_dim"] = args.head_dim  # Meta's code lacks this key, and cannot run such a model
    if args.use_scaled_rope:
        params["use_scaled_rope"] = True
        if args.rope_scaling_factor != usual_rope_factor(args.dim, args.n_heads, args.n_kv_heads):
            params["rope_scaling_factor"] = args.rope_scaling_factor
    return params | (_make_vision_params(args) if args.has_vision else {})


def _make_vision_params(args: ModelArgs) -> dict[str, Any]:
    """The keys of a vision model."""
    usual = {field.name: field.default for field in fields(ModelArgs)}
    values = {name: getattr(args, name) for name in VISION_FIELDS}
    written = {name: value for name, value in values.items() if name in METAS_VISION_FIELDS or value != usual[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in written.items()}


def _ffn_formula(args: ModelArgs) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) for `args.ffn_dim`: given, a release's or the shortest."""
    if args.hidden_dim is None:
        return args.multiple_of, args.ffn_dim_multiplier
    for shape in SHAPES.values():
        formula = shape["multiple_of"], shape["ffn_dim_multiplier"]
        if ffn_dim(args.dim, *formula) == args.hidden_dim and shape["dim"] == args.dim:
            return formula
    # A larger multiple accepts more multipliers, so the shortest one has fewer digits.
    multiple_of = math.gcd(args.hidden_dim, LARGEST_MULTIPLE)  # the largest power of two that divides it
    if ffn_dim(args.dim, multiple_of, None) == args.hidden_dim:
        return multiple_of, None
    return multiple_of, _shortest_multiplier(args.dim, multiple_of, args.hidden_dim)


def _shortest_multiplier(dim: int, multiple_of: int, width: int) -> float:
    """The multiplier with the fewest decimals for which `ffn_dim` gives `width`."""
    plain, least = ffn_dim(dim, 1, None), width - multiple_of + 1
    scales = (10**digits for digits in count())
    numerators = ((-(-least * scale // plain), scale) for scale in scales)
    # Each is the smallest to reach `least`. In floating point its product may fall just short, so
    # the next one is tried too.
    multipliers = (numerator / scale for smallest, scale in numerators for numerator in (smallest, smallest + 1))
    return next(multiplier for multiplier in multipliers if ffn_dim(dim, multiple_of, multiplier) == width)
