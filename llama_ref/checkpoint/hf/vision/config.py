"""The config.json of a vision model (mllama), with a section for the text model and one for the encoder."""

from collections.abc import Mapping
from typing import Any

from llama_ref.args import PATCH_SIZE, ModelArgs
from llama_ref.checkpoint.hf.allowed import expect
from llama_ref.checkpoint.hf.names import numbers_of_cross_layers
from llama_ref.checkpoint.hf.vision.tile_tables import tile_grids
from llama_ref.files import BadValue
from llama_ref.formatting import short

VISION_MODEL, VISION_CLASS = "mllama", "MllamaForConditionalGeneration"
SECTIONS = TEXT, VISION = "text_config", "vision_config"

VISION_KEYS = {  # ModelArgs' name: Hugging Face's in vision_config
    "vision_chunk_size": "image_size",
    "vision_max_num_chunks": "max_num_tiles",
    "vision_dim": "hidden_size",
    "vision_n_layers": "num_hidden_layers",
    "vision_n_global_layers": "num_global_layers",
    "vision_n_heads": "attention_heads",
    "vision_kept_layers": "intermediate_layers_indices",
}
CROSS_LAYERS = "cross_attention_layers"
VISION_NAMES = {name: f"{VISION}.{key}" for name, key in VISION_KEYS.items()} | {
    "vision_num_cross_attention_layers": CROSS_LAYERS
}

# transformers' defaults for absent or null keys: those of the 11B with tiles of 448 pixels.
TEXT_DEFAULTS: dict[str, Any] = {
    "model_type": "mllama_text_model",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "rms_norm_eps": 1e-5,
    CROSS_LAYERS: [3, 8, 13, 18, 23, 28, 33, 38],
}
DEFAULT_THETA = 500000.0
VISION_DEFAULTS: dict[str, Any] = {
    "image_size": 448,
    "max_num_tiles": 4,
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "attention_heads": 16,
    "intermediate_layers_indices": [3, 7, 15, 23, 30],
    "intermediate_size": 5120,
    "vision_output_dim": 7680,
    "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
}
DEFAULT_IMAGE_ID = 128256


def text_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's keys as a text model's config.json has them, without the cross-attention layers.

    Raises UnsupportedModel or BadValue, naming the key.
    """
    expect(config, "architectures", ([VISION_CLASS],), "no other class has the text model and the encoder")
    text = TEXT_DEFAULTS | _section(config, TEXT)
    expect(text, "model_type", (TEXT_DEFAULTS["model_type"],), "it is the text model of mllama", f"{TEXT}.")
    expect(text, "tie_word_embeddings", (False,), "the embedding has more rows than the output", f"{TEXT}.")
    cross, n_layers = text.pop(CROSS_LAYERS), text["num_hidden_layers"]
    if not isinstance(cross, list) or not cross or not all(type(number) is int for number in cross):
        raise BadValue(f'"{CROSS_LAYERS}" is {short(cross)}, expected a list of numbers of layers')
    if type(n_layers) is int:  # other types are reported later, as for any number
        if n_layers <= len(cross):
            raise BadValue(f'"{TEXT}.num_hidden_layers" is {n_layers}, expected more than its {len(cross)} {CROSS_LAYERS}')
        text["num_hidden_layers"] = n_layers - len(cross)
    rope = text.get("rope_parameters")
    if not (isinstance(rope, dict) and "rope_theta" in rope):
        text.setdefault("rope_theta", DEFAULT_THETA)
    return text | {"model_type": "llama", "architectures": None}


def vision_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """The vision keys of params.json; `ModelArgs.from_dict` checks them."""
    section = VISION_DEFAULTS | _section(config, VISION)
    n_cross = len((TEXT_DEFAULTS | _section(config, TEXT))[CROSS_LAYERS])
    return {name: section[key] for name, key in VISION_KEYS.items()} | {"vision_num_cross_attention_layers": n_cross}


def check_vision_sections(config: Mapping[str, Any], args: ModelArgs) -> None:
    """Raise UnsupportedModel, naming the key, if a value is not possible in Llama 3.2 vision."""
    text, section = TEXT_DEFAULTS | _section(config, TEXT), VISION_DEFAULTS | _section(config, VISION)
    image_id = {"image_token_index": config.get("image_token_index", DEFAULT_IMAGE_ID)}
    expect(image_id, "image_token_index", (args.vocab_size,), "an image's id is the first after the vocabulary")
    why = f"the layers are every k-th of the {args.n_layers} others, counted back from the last"
    expect(text, CROSS_LAYERS, (numbers_of_cross_layers(args),), why)
    expect(text, "head_dim", (args.dim // args.n_heads,), "heads are as wide as hidden_size / num_attention_heads", f"{TEXT}.")
    for key, value in _fixed(args).items():
        expect(section, key, (value,), "Llama 3.2's encoder has this value", f"{VISION}.")


def _fixed(args: ModelArgs) -> dict[str, Any]:
    """Keys of vision_config that are the same in all encoders of this shape."""
    return {
        "model_type": "mllama_vision_model",
        "hidden_act": "gelu",
        "norm_eps": 1e-5,
        "num_channels": 3,
        "patch_size": PATCH_SIZE,
        "intermediate_size": 4 * args.vision_dim,
        "intermediate_layers_indices": sorted(set(args.vision_kept_layers)),
        "vision_output_dim": (1 + len(args.vision_kept_layers)) * args.vision_dim,
        "supported_aspect_ratios": [list(grid) for grid in tile_grids(args.vision_max_num_chunks)],
    }


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section's keys that have a value."""
    section = config.get(name) or {}
    if not isinstance(section, dict):
        raise BadValue(f'"{name}" is {short(section)}, expected an object')
    return {key: value for key, value in section.items() if value is not None}


# The keys of a text model's config.json that text_config also has.
TEXT_KEYS = (
    *("bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range", "intermediate_size"),
    *("max_position_embeddings", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_scaling", "rope_theta"),
    *("torch_dtype", "use_cache", "vocab_size"),
)


def make_vision_config(args: ModelArgs, config: Mapping[str, Any], *, pad: int) -> dict[str, Any]:
    """The config.json of a vision model. `config` is its text model's, `pad` the padding id."""
    cross = numbers_of_cross_layers(args)
    text = {key: config[key] for key in TEXT_KEYS} | {
        CROSS_LAYERS: cross,
        "dropout": 0,
        "model_type": TEXT_DEFAULTS["model_type"],
        "num_hidden_layers": args.n_layers + len(cross),
        "pad_token_id": pad,
        "tie_word_embeddings": False,
    }
    values = {key: getattr(args, name) for name, key in VISION_KEYS.items()}
    vision = values | _fixed(args) | {"initializer_range": 0.02, "torch_dtype": config["torch_dtype"]}
    return {
        "architectures": [VISION_CLASS],
        "image_token_index": args.vocab_size,
        "model_type": VISION_MODEL,
        TEXT: dict(sorted(text.items())),
        "torch_dtype": config["torch_dtype"],
        VISION: dict(sorted(vision.items())),
    }
