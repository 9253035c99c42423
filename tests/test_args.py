"""params.json is read and checked; errors name the file and the key."""

import json
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attempts import attempts
from llama_ref.args import PARAMS_LIMIT_BYTES, ModelArgs, ffn_dim
from llama_ref.errors import CheckpointError

LLAMA_3_8B = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 1024,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
SCALED = {**LLAMA_3_8B, "use_scaled_rope": True}
VISION = {"vision_chunk_size": 448, "vision_max_num_chunks": 4, "vision_num_cross_attention_layers": 8}
QLORA = {
    "quantization_args": {"scheme": "int4", "group_size": 256, "spinquant": False},
    "lora_args": {"rank": 16, "scale": 2.0},
}


@pytest.fixture
def params_file(tmp_path):
    """Write params.json from a dictionary or raw text, and return its path."""

    def write(params: dict | str | bytes) -> Path:
        path = tmp_path / "params.json"
        raw = json.dumps(params) if isinstance(params, dict) else params
        path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
        return path

    return write


def test_every_key_is_read(params_file):
    params = SCALED | VISION | QLORA | {"rope_scaling_factor": 8.0}
    args = ModelArgs.from_json(params_file(params))
    assert {key: getattr(args, key) for key in params} == params
    assert (args.head_dim, args.ffn_dim, args.extra) == (128, 14336, {})


def test_absent_keys_have_their_usual_meaning(params_file):
    needed = ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "norm_eps", "rope_theta")
    args = ModelArgs.from_json(params_file({key: LLAMA_3_8B[key] for key in needed}))
    assert args.n_kv_heads == args.n_heads == 32
    assert not args.use_scaled_rope
    assert args.ffn_dim == 11264  # 8/3 · 4096 is 10,922
    assert args.ffn_dim_multiplier is args.quantization_args is args.lora_args is args.vision_chunk_size is None


@pytest.mark.parametrize("unknown", [{"max_seq_len": 8192}, {"a": {"b": [1, None]}, "c": float("nan")}, {"extra": 1}])
def test_unknown_keys_are_kept(params_file, unknown):
    args = ModelArgs.from_json(params_file(LLAMA_3_8B | unknown))
    assert args.extra.keys() == unknown.keys()
    assert repr(args.extra) == repr(unknown)  # a NaN equals nothing
    assert args == ModelArgs.from_dict(LLAMA_3_8B | dict(args.extra))


def test_null_means_absent(params_file):
    nulls = dict.fromkeys((*VISION, *QLORA, "ffn_dim_multiplier", "use_scaled_rope", "rope_scaling_factor", "stray"))
    args = ModelArgs.from_json(params_file(LLAMA_3_8B | nulls))
    assert args == ModelArgs.from_dict({key: value for key, value in LLAMA_3_8B.items() if key != "ffn_dim_multiplier"})


def test_the_pruned_guards_own_names_are_read():
    guard = {key: value for key, value in SCALED.items() if key not in ("multiple_of", "ffn_dim_multiplier", "rope_theta")}
    args = ModelArgs.from_dict(guard | {"hidden_dim": 6400, "rope_freq_base": 500000.0})
    assert (args.ffn_dim, args.rope_theta, args.extra) == (6400, 500000.0, {})


def test_integers_are_accepted_as_floats_and_the_callers_dictionary_is_unchanged():
    params = LLAMA_3_8B | {"rope_theta": 500000, "ffn_dim_multiplier": 1}
    before = dict(params)
    args = ModelArgs.from_dict(params)
    assert (args.rope_theta, args.ffn_dim_multiplier) == (500000.0, 1.0)
    assert type(args.rope_theta) is type(args.ffn_dim_multiplier) is float
    assert params == before


@pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "norm_eps", "rope_theta"])
@pytest.mark.parametrize("null", [True, False])
def test_a_missing_key_is_named_with_the_file(params_file, key, null):
    params = {k: v for k, v in LLAMA_3_8B.items() if k != key} | ({key: None} if null else {})
    path = params_file(params)
    with pytest.raises(CheckpointError, match=rf"params\.json: lacks {key}\b.*it has .*") as error:
        ModelArgs.from_json(path)
    assert str(path) in str(error.value)


def test_all_missing_keys_are_named_at_once(params_file):
    with pytest.raises(CheckpointError, match=r"lacks n_layers, n_heads, norm_eps, rope_theta, multiple_of; it has .*dim"):
        ModelArgs.from_json(params_file({"dim": 64, "vocab_size": 320}))
    with pytest.raises(CheckpointError, match=r"lacks dim, .* it has no keys at all"):
        ModelArgs.from_json(params_file({}))
    with pytest.raises(CheckpointError, match=r"lacks dim, .* it has \['dim', 'model'\]"):
        ModelArgs.from_json(params_file({"model": None, "dim": None}))


MISTYPED = {
    **{
        key: ["64", 64.0, 0, -1, True, [64], {}, 1 << 40, 10**400]
        for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "hidden_dim", *VISION)
    },
    **{
        key: ["1", 0, -1.5, False, [1.0], float("nan"), float("inf"), 10**400]
        for key in ("ffn_dim_multiplier", "norm_eps", "rope_theta", "rope_scaling_factor")
    },
    "use_scaled_rope": [1, 0, "true", [], {}],
    "quantization_args": [True, "int4", [], 4],
    "lora_args": [True, 16, ["rank"]],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in MISTYPED.items() for value in values])
def test_a_mistyped_value_is_shown_with_its_key(params_file, key, value):
    with pytest.raises(CheckpointError, match=rf'params\.json: "{key}" is .{{1,60}}, expected ') as error:
        ModelArgs.from_json(params_file(json.dumps(SCALED | {key: value})))
    assert repr(value)[:15] in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_heads": 33}, '"dim" 4096 is not a multiple of "n_heads" 33'),
        ({"n_kv_heads": 5}, '"n_heads" 32 is not a multiple of "n_kv_heads" 5'),
        ({"n_kv_heads": 64}, '"n_heads" 32 is not a multiple of "n_kv_heads" 64'),
        ({"n_heads": 4096, "n_kv_heads": 4096}, "odd width 1"),
        ({"hidden_dim": 14337}, '"hidden_dim" is 14337, but "multiple_of" and "ffn_dim_multiplier" give 14336'),
        ({"rope_scaling_factor": 0.5}, '"rope_scaling_factor" is 0.5, expected 1 or more'),
        ({"rope_freq_base": 10000.0}, 'duplicate key "rope_theta" with different values 500000.0 and 10000.0'),
        ({"n_layers": 10_001}, '"n_layers" is 10,001, expected at most 10,000'),
        ({"ffn_dim_multiplier": 1e-9}, '"ffn_dim_multiplier" 1e-09 give an impossible feed-forward width'),
        ({"ffn_dim_multiplier": 1e308}, '"ffn_dim_multiplier" 1e+308 give an impossible feed-forward width'),
        ({"ffn_dim_multiplier": 1e6}, '"ffn_dim_multiplier" 1e+06 give an impossible feed-forward width'),
    ],
)
def test_contradictory_keys_are_named(params_file, changes, named):
    with pytest.raises(CheckpointError) as error:
        ModelArgs.from_json(params_file(SCALED | changes))
    assert named in str(error.value)
    assert "params.json: " in str(error.value)


def test_a_duplicate_key_must_not_have_two_values(params_file):
    text = json.dumps(LLAMA_3_8B)
    assert ModelArgs.from_json(params_file(text[:-1] + ', "dim": 4096}')).dim == 4096
    with pytest.raises(CheckpointError, match='duplicate key "dim" with different values 4096 and 2048'):
        ModelArgs.from_json(params_file(text[:-1] + ', "dim": 2048}'))


SHAPE_1B = {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "ffn_dim_multiplier": 1.5, "multiple_of": 256}
SHAPE_3B = {"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8, "ffn_dim_multiplier": 1.0, "multiple_of": 256}


@pytest.mark.parametrize(
    ("params", "keyword", "factor"),
    [
        (SCALED, None, 8),
        (SCALED | SHAPE_1B, None, 32),
        (SCALED | SHAPE_3B, None, 32),
        (SCALED | SHAPE_1B | {"n_layers": 12}, None, 32),  # pruned, scaled like the 1B
        (SCALED | SHAPE_1B | {"n_kv_heads": 4}, None, 8),
        (SCALED | SHAPE_1B | {"rope_scaling_factor": 16}, None, 16),
        (SCALED | SHAPE_1B, 8, 8),
        (SCALED | {"rope_scaling_factor": 16}, 4.5, 4.5),
        (LLAMA_3_8B | SHAPE_1B, None, 1),
        (LLAMA_3_8B | {"rope_scaling_factor": 32}, None, 1),
        (SCALED | {"use_scaled_rope": False}, 32, 1),
    ],
)
def test_the_rope_factor_follows_keyword_then_key_then_shape(params_file, params, keyword, factor):
    args = ModelArgs.from_json(params_file(params), rope_scaling_factor=keyword)
    assert args.rope_scaling_factor == ModelArgs.from_dict(params, rope_scaling_factor=keyword).rope_scaling_factor == factor
    assert (args.rope_scaling_factor == 1) == (not args.use_scaled_rope)


@pytest.mark.parametrize("factor", [0, 0.99, -8, "8", True, float("nan"), float("inf")])
def test_a_factor_given_by_the_caller_is_checked_too(factor):
    with pytest.raises(CheckpointError, match=r'"rope_scaling_factor" is .* expected'):
        ModelArgs.from_dict(SCALED, rope_scaling_factor=factor)


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "width"),
    [
        (2048, 256, 1.5, 8192),
        (3072, 256, 1.0, 8192),
        (4096, 1024, 1.3, 14336),
        (8192, 4096, 1.3, 28672),
        (16384, 4096, 1.2, 53248),
        (64, 1, None, 170),  # 170.67, truncated first
        (64, 1, 1.3, 221),  # 1.3 · 170, not 1.3 · 170.67
        (576, 256, 1.0, 1536),  # already a multiple
        (577, 256, 1.0, 1792),
    ],
)
def test_feed_forward_widths(dim, multiple_of, multiplier, width):
    assert ffn_dim(dim, multiple_of, multiplier) == width


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>sign in</html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b'{"error": "forbidden"}', "a JSON error body"),
        (b"\0" * 200, "a run of zero bytes"),
        (b'{"dim": 4096', "is not valid JSON"),
        (b"\xff\xfe\xfd{}", "is not valid JSON"),
        (b'{"dim": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"[1]", "holds a list, expected an object"),
        (b"7", "holds a number"),
        (b'"params"', "holds a string"),
        (b"null", "holds null"),
        (b"true", "holds true or false"),
        (b"[" * 1_000_000, "nested far deeper"),
        (b'{"dim":' * 140_000, "nested far deeper"),
    ],
)
def test_other_files_are_recognised(params_file, content, says):
    with pytest.raises(CheckpointError, match=says) as error:
        ModelArgs.from_json(params_file(content))
    assert "params.json" in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_byte_order_mark_does_no_harm(params_file):
    assert ModelArgs.from_json(params_file("\ufeff" + json.dumps(LLAMA_3_8B))).dim == 4096


def test_messages_stay_short_and_printable_whatever_the_file_holds(params_file):
    deep = "[" * 200 + "]" * 200
    long = json.dumps({"\ud800\x1b[31m" + "k" * 10_000 + str(i): 1 for i in range(50)})
    for text in (long, f'{{"dim": {deep}, "dim": 1}}', json.dumps(LLAMA_3_8B)[:-1] + f', "lora_args": {deep}}}'):
        with pytest.raises(CheckpointError) as error:
            ModelArgs.from_json(params_file(text))
        assert len(str(error.value)) < 2000
        assert "\x1b" not in str(error.value)
        str(error.value).encode()


@pytest.mark.parametrize("path", ["no such file", "a\0b", "x" * 5000, "."])
def test_a_path_to_nothing_readable_is_named(tmp_path, path):
    with pytest.raises(CheckpointError, match=r"cannot read|is not a plain file"):
        ModelArgs.from_json(tmp_path / path)


@pytest.mark.parametrize("head", [b'{"dim": 1', b"[" * 1_000])
def test_a_huge_file_is_refused_at_once_and_in_little_memory(tmp_path, head):
    path = tmp_path / "params.json"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(1 << 30)  # sparse
    tracemalloc.start()
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=f"larger than {PARAMS_LIMIT_BYTES:,} bytes"):
        ModelArgs.from_json(path)
    busy, (_, peak) = time.process_time() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert busy < 1
    assert peak < 4 * PARAMS_LIMIT_BYTES


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(1, 8) | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from([*LLAMA_3_8B, *MISTYPED, "rope_freq_base"]) | st.text(max_size=5)


@pytest.mark.attack
@settings(max_examples=attempts(100))
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_no_bytes_raise_anything_else(tmp_path_factory, content):
    read_or_refuse(tmp_path_factory, content)


@pytest.mark.attack
@settings(max_examples=attempts(100))
@given(st.dictionaries(KEYS, VALUES, max_size=4), st.booleans())
def test_no_json_raises_anything_else(tmp_path_factory, changes, complete):
    read_or_refuse(tmp_path_factory, json.dumps((SCALED if complete else {}) | changes).encode())


def read_or_refuse(tmp_path_factory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "arbitrary.json"
    path.write_bytes(content)
    try:
        args = ModelArgs.from_json(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert args.head_dim > 0 and args.ffn_dim > 0 and args.rope_scaling_factor >= 1
