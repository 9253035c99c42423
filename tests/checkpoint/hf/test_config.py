"""config.json is read, rejected with the reason, and written; so is the equivalent params.json."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_ref.args import PARAMS_LIMIT_BYTES, ModelArgs
from llama_ref.checkpoint.hf.config import make_config, make_generation_config, make_params, read_config
from llama_ref.checkpoint.releases import RELEASES
from llama_ref.errors import CheckpointError

LLAMA_3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA_3_2_1B = {  # from Meta's release on Hugging Face
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 32.0, **LLAMA_3_ROPE, "rope_type": "llama3"},
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_3 = LLAMA_3_2_1B | {"rope_scaling": None}
WITHOUT_THETA = {key: value for key, value in LLAMA_3.items() if key != "rope_theta"}
CHAT = {"bos": 128000, "eos": [128001, 128008, 128009]}
SCALING = LLAMA_3_2_1B["rope_scaling"]
TEXT_RELEASES = [
    pytest.param(release, id=name)
    for name, release in RELEASES.items()
    if not ("vision_chunk_size" in release.params or "quantization_args" in release.params)
]


@pytest.fixture
def config_file(tmp_path):
    """Write config.json from a dictionary or raw text, and return its path."""

    def write(config: dict | str | bytes) -> Path:
        path = tmp_path / "config.json"
        raw = json.dumps(config) if isinstance(config, dict) else config
        path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
        return path

    return write


def means_the_same(a: ModelArgs, b: ModelArgs) -> bool:
    """Equal, whether the FFN's width is given by hidden_dim or by the formula."""
    same = {"multiple_of": 1, "ffn_dim_multiplier": None}
    return replace(a, hidden_dim=a.ffn_dim, **same) == replace(b, hidden_dim=b.ffn_dim, **same)


def without(config: dict, *keys: str) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


def test_metas_own_file_is_read_and_written(config_file):
    config = read_config(config_file(LLAMA_3_2_1B))
    assert means_the_same(config.args, ModelArgs.from_dict(RELEASES["Llama3.2-1B"].params))
    assert config.tied
    assert make_config(config.args, tied=True, dtype=torch.bfloat16, **CHAT) == LLAMA_3_2_1B


@pytest.mark.parametrize("release", TEXT_RELEASES)
def test_every_text_release_goes_there_and_back(release, config_file):
    args = ModelArgs.from_dict(release.params)
    written = make_config(args, tied=release.tied, dtype=torch.bfloat16, **CHAT)
    config = read_config(config_file(written))
    assert means_the_same(config.args, args)
    assert config.tied == release.tied
    if "hidden_dim" not in release.params and release.params.get("use_scaled_rope") is not False:
        assert make_params(config.args) == release.params
    assert means_the_same(ModelArgs.from_dict(make_params(config.args)), args)


def test_ids_and_defaults_for_generation():
    assert make_generation_config(**CHAT) == {
        "bos_token_id": 128000,
        "do_sample": True,
        "eos_token_id": [128001, 128008, 128009],
        "temperature": 0.6,
        "top_p": 0.9,
    }
    assert make_generation_config(bos=1, eos=(2,))["eos_token_id"] == 2
    args = ModelArgs.from_dict(RELEASES["Llama-3-8B"].params)
    config = make_config(args, tied=False, dtype=torch.float32, bos=1, eos=(2,))
    same = ("eos_token_id", "rope_scaling", "max_position_embeddings", "torch_dtype", "tie_word_embeddings")
    assert [config[key] for key in same] == [2, None, 8192, "float32", False]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000.0, "rope_scaling": SCALING},
        {"rope_theta": 500000, "rope_scaling": without(SCALING, "rope_type") | {"type": "llama3", "factor": 32}},
        {"rope_theta": 500000.0, "rope_scaling": SCALING | {"type": "llama3"}},
        {"rope_parameters": SCALING | {"rope_theta": 500000.0}},
        {"rope_theta": 500000.0, "rope_parameters": SCALING, "rope_scaling": None},
        {"rope_theta": 500000.0, "rope_parameters": SCALING | {"rope_theta": 500000.0}, "rope_scaling": SCALING},
        {"rope_parameters": SCALING | {"rope_theta": 500000.0, "partial_rotary_factor": 1.0}},
    ],
)
def test_every_way_to_say_scaled_rope_means_the_same(config_file, rope):
    args = read_config(config_file(without(LLAMA_3_2_1B, "rope_theta", "rope_scaling") | rope)).args
    assert (args.use_scaled_rope, args.rope_scaling_factor, args.rope_theta) == (True, 32.0, 500000.0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 10000},
        {"rope_theta": 10000.0, "rope_scaling": None},
        {"rope_theta": 10000.0, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_theta": 10000.0}},
    ],
)
def test_every_way_to_say_plain_rope_means_the_same(config_file, rope):
    args = read_config(config_file(without(LLAMA_3_2_1B, "rope_theta", "rope_scaling") | rope)).args
    assert (args.use_scaled_rope, args.rope_scaling_factor, args.rope_theta) == (False, 1.0, 10000.0)


@pytest.mark.parametrize("absent", [without, lambda config, *keys: config | dict.fromkeys(keys)])
def test_absent_and_null_keys_have_transformers_meaning(config_file, absent):
    config = absent(
        LLAMA_3,
        *("num_key_value_heads", "head_dim", "tie_word_embeddings", "architectures", "attention_bias", "mlp_bias"),
        *("hidden_act", "sliding_window", "quantization_config", "rope_scaling", "torch_dtype", "bos_token_id"),
    )
    read = read_config(config_file(config))
    assert read.args.n_kv_heads == 32
    assert not read.tied


REFUSED = [
    ({"model_type": "llama4", "text_config": {}}, '"model_type" is \'llama4\', expected "llama" or "mllama": only Llama 3'),
    ({"model_type": "qwen2"}, '"model_type" is \'qwen2\', expected "llama" or "mllama": only Llama 3'),
    ({"model_type": 3}, '"model_type" is 3, expected "llama" or "mllama"'),
    ({"architectures": ["LlamaForSequenceClassification"]}, "['LlamaForSequenceClassification'], expected"),
    ({"architectures": []}, '"architectures" is [], expected ["LlamaForCausalLM"]: no other class has an output'),
    ({"architectures": "LlamaForCausalLM"}, '"architectures" is '),
    ({"attention_bias": True}, '"attention_bias" is True, expected false: Llama 3\'s projections have no biases'),
    ({"attention_bias": 0}, '"attention_bias" is 0, expected false'),
    ({"mlp_bias": True}, '"mlp_bias" is True, expected false'),
    ({"mlp_bias": "false"}, "\"mlp_bias\" is 'false', expected false"),
    ({"hidden_act": "gelu"}, '"hidden_act" is \'gelu\', expected "silu" or "swish"'),
    ({"sliding_window": 4096}, '"sliding_window" is 4096, expected none'),
    ({"tie_word_embeddings": 1}, '"tie_word_embeddings" is 1, expected false or true'),
    (
        {"quantization_config": {"quant_method": "awq"}},
        "'awq'}, expected none, or int8 by bitsandbytes: its weights are quantized",
    ),
    ({"compression_config": {"format": "int"}}, '"compression_config" is '),
    ({"head_dim": "64"}, "\"head_dim\" is '64', expected a whole number from 1"),
    ({"head_dim": 0}, '"head_dim" is 0, expected a whole number from 1'),
    ({"head_dim": 63}, '"head_dim" gives a head of odd width 63, which RoPE cannot rotate'),
    ({"head_dim": 1 << 24}, '"num_attention_heads" 32 and "head_dim" 16777216 give heads wider than'),
    ({"head_dim": None, "hidden_size": 2049}, '"hidden_size" 2049 is not a multiple of "num_attention_heads" 32'),
    ({"head_dim": None, "hidden_size": 2016}, '"hidden_size" 2016 / "num_attention_heads" 32 gives a head of odd width'),
    ({"num_key_value_heads": 5}, '"num_attention_heads" 32 is not a multiple of "num_key_value_heads" 5'),
    ({"num_hidden_layers": 10_001}, '"num_hidden_layers" is 10,001, expected at most'),
    ({"rope_scaling": [8.0]}, '"rope_scaling" is [8.0], expected an object or null'),
    ({"rope_parameters": "llama3"}, "\"rope_parameters\" is 'llama3', expected an object or null"),
    ({"rope_scaling": {"factor": 8.0}}, "lacks rope_type"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor, original_max"),
    ({"rope_scaling": without(SCALING, "factor")}, "lacks factor"),
    ({"rope_scaling": SCALING | {"factor": "8"}}, "\"factor\" is '8', expected a positive number"),
    ({"rope_scaling": SCALING | {"factor": 0.5}}, '"factor" is 0.5, expected 1 or more'),
    ({"rope_scaling": SCALING | {"low_freq_factor": 2.0}}, '"low_freq_factor" is 2.0, expected 1.0'),
    ({"rope_scaling": SCALING | {"low_freq_factor": True}}, '"low_freq_factor" is True, expected 1.0'),
    ({"rope_scaling": SCALING | {"high_freq_factor": 8.0}}, '"high_freq_factor" is 8.0, expected 4.0'),
    ({"rope_scaling": SCALING | {"original_max_position_embeddings": 4096}}, "4096, expected 8192"),
    ({"original_max_position_embeddings": 4096}, 'duplicate key "original_max_position_embeddings"'),
    ({"partial_rotary_factor": 0.5}, '"partial_rotary_factor" is 0.5, expected 1.0'),
    ({"rope_scaling": SCALING | {"type": "linear"}}, "duplicate key \"rope_type\" with different values 'llama3' and 'linear'"),
    ({"rope_parameters": SCALING | {"rope_theta": 1.0}}, 'duplicate key "rope_theta" with different values 500000.0 and 1.0'),
    ({"rope_parameters": SCALING | {"factor": 8.0}}, 'duplicate key "factor" with different values 32.0 and 8.0'),
    *(
        ({"rope_scaling": {key: kind, "factor": 2.0}}, f'"rope_type" is {kind!r}, expected "default" or "llama3"')
        for kind in ("linear", "dynamic", "yarn", "longrope", ["llama3"])
        for key in ("rope_type", "type")
    ),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED)
def test_other_models_are_refused_by_key_and_value(config_file, changes, says):
    with pytest.raises(CheckpointError) as error:
        read_config(config_file(LLAMA_3_2_1B | changes))
    assert says in str(error.value)
    assert "config.json: " in str(error.value)


NEEDED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rms_norm_eps"),
    *("rope_theta", "model_type"),
)


@pytest.mark.parametrize("key", NEEDED)
def test_a_missing_key_is_named_as_the_file_calls_it(config_file, key):
    with pytest.raises(CheckpointError, match=rf"config\.json: lacks {key}\b.*; it has "):
        read_config(config_file(without(LLAMA_3_2_1B, key)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in (*NEEDED[:5], "num_key_value_heads") for value in ("64", 64.0, 0, -1, True, [64], 10**400)),
        *((key, value) for key in ("rms_norm_eps", "rope_theta") for value in ("1", 0, False, [1], float("nan"), 10**400)),
    ],
)
def test_a_mistyped_value_is_shown_with_its_key(config_file, key, value):
    with pytest.raises(CheckpointError, match=rf'config\.json: "{key}" is .{{1,60}}, expected '):
        read_config(config_file(LLAMA_3 | {key: value}))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>sign in</html>", "an HTML page, not the model's config.json"),
        (b'{"error": "gated repo"}', "a JSON error body"),
        (b'{"model_type": "llama"', "is not valid JSON"),
        (b"[1]", "holds a list, expected an object with model_type"),
        (b"{}", "lacks hidden_size, .*model_type; it has no keys at all"),
        (json.dumps(WITHOUT_THETA).encode(), r"lacks rope_theta \(.*; it has \['architectures', .*'mlp_bias', "),
        (b'{"a": ' * 140_000, "nested far deeper than the model's config.json"),
        (b" " * (PARAMS_LIMIT_BYTES + 1), "larger than"),
        (b'{"model_type": "llama", "model_type": "qwen2"}', "duplicate key"),
    ],
)
def test_other_files_are_recognised(config_file, content, says):
    with pytest.raises(CheckpointError, match=says) as error:
        read_config(config_file(content))
    assert "config.json" in str(error.value)
    assert len(str(error.value)) < 1000


def test_gigabytes_are_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.write(b'{"model_type": "llama"')
        file.truncate(5 << 30)  # sparse
    with pytest.raises(CheckpointError, match="larger than"):
        read_config(tmp_path / "config.json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 8) | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*SCALING, "type", "x"]), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*LLAMA_3_2_1B, "rope_parameters", "sliding_window"]), VALUES, min_size=1, max_size=3))
def test_no_json_raises_anything_else(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "arbitrary_config.json"
    path.write_text(json.dumps(LLAMA_3_2_1B | changes))
    try:
        args = read_config(path).args
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert means_the_same(ModelArgs.from_dict(make_params(args)), args)


@st.composite
def shapes(draw) -> ModelArgs:
    """Any shape that a config.json may describe, most of them unusual."""
    n_kv_heads, factor = draw(st.integers(1, 8)), draw(st.sampled_from([None, 1.0, 8.0, 12.5, 32.0]))
    n_heads = n_kv_heads * draw(st.integers(1, 8))
    return ModelArgs.from_dict(
        {
            "dim": n_heads * 2 * draw(st.integers(1, 128)),
            "n_layers": draw(st.integers(1, 200)),
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "vocab_size": draw(st.integers(1, 1 << 20)),
            "hidden_dim": draw(st.integers(1, 100_000) | st.integers(1, 100).map(lambda n: 256 * n) | st.just(1 << 28)),
            "norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
            "rope_theta": draw(st.floats(1, 1e7)),
            "use_scaled_rope": factor is not None,
            "rope_scaling_factor": factor,
        }
    )


@given(shapes(), st.booleans())
def test_any_shape_goes_there_and_back_and_has_a_formula(tmp_path_factory, args, tied):
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_text(json.dumps(make_config(args, tied=tied, dtype=torch.float16, bos=0, eos=[1, 2])))
    config = read_config(path)
    assert config.args == args
    assert config.tied == tied

    params = json.loads(json.dumps(make_params(args)))
    again = ModelArgs.from_dict(params)
    assert "hidden_dim" not in params
    assert None not in params.values()
    assert means_the_same(again, args)
    assert make_params(again) == params


@pytest.mark.parametrize(
    ("dim", "width", "multiple_of", "multiplier"),
    [
        (576, 1536, 512, None),  # SmolLM2 135M
        (4096, 11008, 256, None),  # Llama 2 7B
        (4096, 14336, 1024, 1.3),  # as in the 8B, although 2048 and 1.2 would also work
        (3072, 8192, 256, 1.0),
        (2048, 8192, 256, 1.5),
        (2048, 6400, 256, 1.13),  # the pruned guard; 1.1 and 1.2 miss it
        (64, 171, 1, 1.01),  # 170 and no multiple to help
        (32, 119, 1, 1.41),  # 1.4 · 85 is 119, but 118.99… in floating point
        (16384, 65536, 4096, 1.5),  # multiple_of is at most that of the releases
        (2, 1, 1, 0.2),
    ],
)
def test_the_formula_is_short(dim, width, multiple_of, multiplier):
    args = replace(ModelArgs.from_dict(RELEASES["Llama3.2-1B"].params), dim=dim, n_heads=1, n_kv_heads=1, hidden_dim=width)
    params = make_params(args)
    assert (params["multiple_of"], params.get("ffn_dim_multiplier")) == (multiple_of, multiplier)


def test_an_existing_formula_is_kept():
    args = replace(ModelArgs.from_dict(RELEASES["Llama3.1-8B"].params), multiple_of=2048, ffn_dim_multiplier=1.29)
    assert {"multiple_of": 2048, "ffn_dim_multiplier": 1.29}.items() <= make_params(args).items()


@pytest.mark.parametrize(
    ("name", "factor", "said"), [("Llama3.2-1B", 32, False), ("Llama3.2-1B", 8, True), ("Llama3.1-8B", 32, True)]
)
def test_the_rope_factor_is_written_if_the_shape_does_not_imply_it(name, factor, said):
    args = ModelArgs.from_dict(RELEASES[name].params, rope_scaling_factor=factor)
    assert make_params(args).get("rope_scaling_factor") == (factor if said else None)
