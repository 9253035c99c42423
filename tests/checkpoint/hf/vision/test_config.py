"""The config.json of vision models is read, rejected with the reason, and written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.hf.config import make_config, make_params, read_config
from llama_ref.checkpoint.hf.vision.config import make_vision_config
from llama_ref.checkpoint.releases import RELEASES
from llama_ref.errors import CheckpointError

RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
TEXT = {
    "bos_token_id": 128000,
    "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
    "dropout": 0,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "model_type": "mllama_text_model",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "pad_token_id": 128004,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
VISION = {
    "attention_heads": 16,
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "image_size": 560,
    "initializer_range": 0.02,
    "intermediate_layers_indices": [3, 7, 15, 23, 30],
    "intermediate_size": 5120,
    "max_num_tiles": 4,
    "model_type": "mllama_vision_model",
    "norm_eps": 1e-05,
    "num_channels": 3,
    "num_global_layers": 8,
    "num_hidden_layers": 32,
    "patch_size": 14,
    "supported_aspect_ratios": RATIOS,
    "torch_dtype": "bfloat16",
    "vision_output_dim": 7680,
}
LLAMA_3_2_11B = {  # from the config.json of Meta's release
    "architectures": ["MllamaForConditionalGeneration"],
    "image_token_index": 128256,
    "model_type": "mllama",
    "text_config": TEXT,
    "torch_dtype": "bfloat16",
    "vision_config": VISION,
}
# Keys that transformers 4.45 adds to both sections.
OLDER_KEYS = {"architectures": None, "pruned_heads": {}, "tie_encoder_decoder": False, "max_length": 20, "temperature": 1.0}
CHAT = {"bos": 128000, "eos": [128001, 128008, 128009]}
RELEASE = ModelArgs.from_dict(RELEASES["Llama3.2-11B-Vision-Instruct"].params)
VISION_RELEASES = [
    pytest.param(release, id=name) for name, release in RELEASES.items() if "vision_chunk_size" in release.params
]


@pytest.fixture
def config_file(tmp_path):
    def write(config: dict[str, Any]) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path / "config.json"

    return write


def changed(section: str | None = None, **changes: Any) -> dict[str, Any]:
    return LLAMA_3_2_11B | (changes if section is None else {section: LLAMA_3_2_11B[section] | changes})


def means_the_same(a: ModelArgs, b: ModelArgs) -> bool:
    """Equal, whether the FFN's width is given by hidden_dim or by the formula."""
    same = {"multiple_of": 1, "ffn_dim_multiplier": None, "vision_num_cross_attention_layers": len(a.cross_layers)}
    return replace(a, hidden_dim=a.ffn_dim, **same) == replace(b, hidden_dim=b.ffn_dim, **same)


def written(args: ModelArgs) -> dict[str, Any]:
    return make_vision_config(args, make_config(args, tied=False, dtype=torch.bfloat16, **CHAT), pad=128004)


def test_metas_own_file_is_read_and_written(config_file):
    config = read_config(config_file(LLAMA_3_2_11B))
    assert means_the_same(config.args, RELEASE) and not config.tied
    assert make_params(config.args) == RELEASES["Llama3.2-11B-Vision-Instruct"].params
    assert written(config.args) == LLAMA_3_2_11B


def test_what_older_versions_add_changes_nothing(config_file):
    sections = {"text_config": OLDER_KEYS | TEXT, "vision_config": OLDER_KEYS | VISION | {"tie_word_embeddings": True}}
    assert read_config(config_file(LLAMA_3_2_11B | sections)) == read_config(config_file(LLAMA_3_2_11B))


@pytest.mark.parametrize("release", VISION_RELEASES)
def test_every_vision_release_goes_there_and_back(release, config_file):
    args = ModelArgs.from_dict(release.params)
    config = read_config(config_file(written(args)))
    assert means_the_same(config.args, args)
    assert make_params(config.args) == release.params


@pytest.mark.parametrize("value", [{}, None])
def test_absent_keys_mean_transformers_defaults(config_file, value):
    args = read_config(config_file({"model_type": "mllama", "text_config": value, "vision_config": value})).args
    base = ModelArgs.from_dict(RELEASES["Llama3.2-11B-Vision"].params)
    assert means_the_same(args, replace(base, use_scaled_rope=False, rope_scaling_factor=1.0))


@pytest.mark.parametrize("theta", [{"rope_theta": 1e4}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}])
def test_rope_of_either_version_is_read(config_file, theta):
    text = {key: value for key, value in TEXT.items() if not key.startswith("rope")} | theta
    args = read_config(config_file(LLAMA_3_2_11B | {"text_config": text})).args
    assert (args.rope_theta, args.use_scaled_rope) == (1e4, False)


REFUSED = [
    (changed(architectures=["MllamaForCausalLM"]), '"architectures" is [\'MllamaForCausalLM\'], expected ["MllamaForCond'),
    (changed(image_token_index=128011), '"image_token_index" is 128011, expected 128256: an image\'s id is the first after'),
    (
        changed(quantization_config={"load_in_8bit": True, "quant_method": "bitsandbytes"}),
        "expected none: its weights are quant",
    ),
    (changed(quantization_config={"quant_method": "awq"}), '"quantization_config" is '),
    (changed(compression_config={"format": "int"}), '"compression_config" is '),
    (changed(text_config=[1]), '"text_config" is [1], expected an object'),
    (changed(vision_config="clip"), "\"vision_config\" is 'clip', expected an object"),
    (changed("text_config", model_type="llama"), '"text_config.model_type" is \'llama\', expected "mllama_text_model"'),
    (changed("text_config", tie_word_embeddings=True), '"text_config.tie_word_embeddings" is True, expected false'),
    (changed("text_config", head_dim=64), '"text_config.head_dim" is 64, expected 128'),
    (changed("text_config", hidden_act="gelu"), '"hidden_act" is \'gelu\', expected "silu"'),
    (changed("text_config", cross_attention_layers=[]), '"cross_attention_layers" is [], expected a list of numbers'),
    (changed("text_config", cross_attention_layers=8), '"cross_attention_layers" is 8, expected a list'),
    (
        changed("text_config", cross_attention_layers=[3, 9, 13, 18, 23, 28, 33, 38]),
        "expected [3, 8, 13, 18, 23, 28, 33, 38]: ",
    ),
    (changed("text_config", cross_attention_layers=[3, 8]), "every k-th of the 38 others, counted back from the last"),
    (changed("text_config", num_hidden_layers=8), '"text_config.num_hidden_layers" is 8, expected more than its 8'),
    (changed("text_config", num_hidden_layers="40"), "\"num_hidden_layers\" is '40', expected a whole number"),
    (changed("text_config", rope_scaling={"rope_type": "yarn", "factor": 2.0}), "'yarn'"),
    (changed("vision_config", hidden_act="quick_gelu"), '"vision_config.hidden_act" is \'quick_gelu\', expected "gelu"'),
    (changed("vision_config", hidden_size=1281), '"vision_config.hidden_size" 1281 is not a multiple of'),
    (changed("vision_config", hidden_size="1280"), "\"vision_config.hidden_size\" is '1280', expected a whole number"),
    (changed("vision_config", image_size=500), '"vision_config.image_size" is 500, expected a multiple of 14'),
    (changed("vision_config", image_size=[560, 560]), '"vision_config.image_size" is [560, 560], expected a whole number'),
    (changed("vision_config", intermediate_size=4096), '"vision_config.intermediate_size" is 4096, expected 5120'),
    (changed("vision_config", patch_size=16), '"vision_config.patch_size" is 16, expected 14'),
    (changed("vision_config", num_channels=1), '"vision_config.num_channels" is 1, expected 3'),
    (changed("vision_config", norm_eps=1e-6), '"vision_config.norm_eps" is 1e-06, expected 1e-05'),
    (changed("vision_config", num_global_layers=0), '"vision_config.num_global_layers" is 0, expected'),
    (changed("vision_config", max_num_tiles=6), '"vision_config.supported_aspect_ratios" is '),
    (changed("vision_config", max_num_tiles=65), '"vision_config.max_num_tiles" is 65, expected at most 64'),
    (changed("vision_config", supported_aspect_ratios=RATIOS[:-1]), '"vision_config.supported_aspect_ratios" is '),
    (changed("vision_config", intermediate_layers_indices=[7, 3, 15, 23, 30]), "expected [3, 7, 15, 23, 30]"),
    (changed("vision_config", intermediate_layers_indices=[3, 32]), "expected numbers of the 32 encoder layers"),
    (changed("vision_config", vision_output_dim=1280), '"vision_config.vision_output_dim" is 1280, expected 7680'),
]


@pytest.mark.parametrize(("config", "says"), REFUSED)
def test_other_models_are_refused_by_key_and_value(config_file, config, says):
    with pytest.raises(CheckpointError) as error:
        read_config(config_file(config))
    assert says in str(error.value) and "config.json: " in str(error.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 8) | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*TEXT, *VISION]), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.dictionaries(st.sampled_from([*LLAMA_3_2_11B, "quantization_config"]), VALUES, max_size=2),
    st.dictionaries(st.sampled_from([*TEXT, "head_dim", "rope_parameters"]), VALUES, max_size=2),
    st.dictionaries(st.sampled_from([*VISION]), VALUES, max_size=2),
)
def test_no_json_raises_anything_else(tmp_path_factory, changes, text, vision):
    path = tmp_path_factory.getbasetemp() / "arbitrary_vision_config.json"
    path.write_text(json.dumps(LLAMA_3_2_11B | {"text_config": TEXT | text, "vision_config": VISION | vision} | changes))
    try:
        args = read_config(path).args
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert means_the_same(ModelArgs.from_dict(make_params(args)), args)
