"""Dictionaries of every public format encode and decode as their papers' formulas do."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llama_ref import study
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.study.features import dictionary
from study import feature_folders
from study.feature_folders import Written

DIM, N = 16, 64

FORMATS: dict[str, Callable[..., Written]] = {
    "llama_scope R": feature_folders.llama_scope,
    "llama_scope A": partial(feature_folders.llama_scope, kind="A"),
    "llama_scope M": partial(feature_folders.llama_scope, kind="M"),
    "llama_scope TC": partial(feature_folders.llama_scope, kind="TC"),
    "sparsify": feature_folders.sparsify,
    "sparsify, older name": partial(feature_folders.sparsify, name="layer_1"),
    "sparsify mlp": partial(feature_folders.sparsify, name="layers.1.mlp"),
    "sparsify signed": partial(feature_folders.sparsify, signed=True),
    "sparsify transcoder": partial(feature_folders.sparsify, name="layers.1.mlp", transcode=True, skip=True),
    "goodfire": feature_folders.goodfire,
    "dictionary_learning": feature_folders.dictionary_learning,
    "dictionary_learning TopK": partial(feature_folders.dictionary_learning, k=5),
    "transcoder": feature_folders.transcoders,
    "transcoder, skip, thresholds": partial(feature_folders.transcoders, thresholds=True, skip=True),
}
SITES = {
    "llama_scope A": ("attention.output",) * 2,
    "llama_scope M": ("ffn.output",) * 2,
    "llama_scope TC": ("residual_mid", "ffn.output"),
    "sparsify mlp": ("ffn.output",) * 2,
    "sparsify transcoder": ("ffn.norm", "ffn.output"),
    "transcoder": ("ffn.norm", "ffn.output"),
    "transcoder, skip, thresholds": ("ffn.norm", "ffn.output"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_computes_its_formula(name, tmp_path):
    written = FORMATS[name](tmp_path, DIM, N)
    features = study.open_features(written.path)
    reads, writes = SITES.get(name, ("residual_post",) * 2)
    assert (features.reads, features.writes) == (f"layers.1.{reads}", (f"layers.1.{writes}",))
    assert (len(features), features.dim, features.form, features.dtype) == (N, DIM, written.form, torch.float32)
    x = np.random.default_rng(1).normal(size=(2, 7, DIM)).astype("f4") * 2
    expected = written.encode(x.reshape(14, DIM).astype("f8")).reshape(2, 7, N)
    found = features.encode(torch.from_numpy(x))
    assert 0 < (expected != 0).mean() < 0.7
    np.testing.assert_allclose(found, expected, atol=1e-5)
    read = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) if name.endswith("TC") else x
    y = written.decode(expected, read)
    np.testing.assert_allclose(features.decode(found, torch.from_numpy(x)), y, atol=1e-5)
    np.testing.assert_allclose(features.reconstruct(torch.from_numpy(x)), y, atol=1e-5)
    np.testing.assert_allclose(features.encode_some(torch.from_numpy(x), [3, 40, 9]), expected[..., [3, 40, 9]], atol=1e-5)


@settings(max_examples=25)
@given(data=st.data())
@pytest.mark.parametrize("name", ["llama_scope R", "sparsify", "transcoder, skip, thresholds"])
def test_blocks_of_features_and_of_tokens_change_nothing(name, data, tmp_path_factory):
    dim, n, T = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12))
    k = data.draw(st.integers(1, n * dim))
    options = {"k": k} if name == "sparsify" else {}
    written = FORMATS[name](tmp_path_factory.mktemp("some"), dim, n * dim, data.draw(st.integers(0, 99)), **options)
    x = np.random.default_rng(0).normal(size=(T, dim)).astype("f4")
    with pytest.MonkeyPatch.context() as change:
        change.setattr(dictionary, "BLOCK_NUMBERS", dim * data.draw(st.integers(1, 5)))
        change.setattr(dictionary, "BLOCK_TOKENS", data.draw(st.integers(1, 5)))
        features = study.open_features(written.path)
        found = features.active(torch.from_numpy(x))
        output = features.reconstruct(torch.from_numpy(x))
    expected = written.encode(x.astype("f8"))
    np.testing.assert_allclose(found.dense(), expected, atol=1e-5)
    np.testing.assert_allclose(output, written.decode(expected, x), atol=1e-4)
    assert found.counts().tolist() == (found.dense() != 0).sum(1).tolist()
    for token in range(T):
        here = found.at(token)
        assert [value for _, value in here] == sorted((value for _, value in here), key=lambda value: -abs(value))
        assert {feature: found.dense()[token, feature] for feature, _ in here} == dict(here)


def test_activations_scaled_by_their_own_length(tmp_path):
    """Llama Scope's early format."""
    written = feature_folders.llama_scope(tmp_path, DIM, N, norm_activation="token-wise", sparsity_include_decoder_norm=False)
    features = study.open_features(written.path)
    w = {name: tensor.double() for name, tensor in load_file(written.path / "checkpoints/final.safetensors").items()}
    x = torch.randn(5, DIM, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1, 3, 10, 50])[:, None]
    length = x.double().norm(dim=-1, keepdim=True) / DIM**0.5
    z = (x / length) @ w["encoder.weight"].T + w["encoder.bias"]
    f = z.where(z > 0.4, 0)
    assert torch.allclose(features.encode(x).double(), f, atol=1e-5)
    expected = (f @ w["decoder.weight"].T + w["decoder.bias"]) * length
    assert torch.allclose(features.reconstruct(x).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept_and_the_arithmetic_is_float32(dtype, tmp_path):
    written = feature_folders.transcoders(tmp_path, DIM, N)
    stored = {name: tensor.to(dtype) for name, tensor in load_file(written.path).items()}
    save_file(stored, written.path)
    features = study.open_features(written.path)
    x = torch.randn(3, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = (x.double() @ stored["W_enc"].double().T + stored["b_enc"].double()).relu()
    assert features.dtype == dtype and features.encode(x).dtype == torch.float32
    assert torch.allclose(features.encode(x).double(), expected, atol=1e-5)


def test_one_direction_reads_one_row(tmp_path):
    """The matrices are memory-mapped: a later change of the file's bytes is visible."""
    written = feature_folders.sparsify(tmp_path, DIM, N)
    features = study.open_features(written.path)
    first = features.direction(3)
    file = written.path / "sae.safetensors"
    data = bytearray(file.read_bytes())
    row = first.numpy().tobytes()
    at = data.find(row)
    assert data.count(row) == 1
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write((first * 2).numpy().tobytes())
    assert torch.equal(features.direction(3), first * 2)


def test_a_direction_is_one_unit_of_a_feature_in_the_models_scale(tmp_path):
    features = study.open_features(feature_folders.llama_scope(tmp_path, DIM, N).path)
    one = torch.zeros(1, N)
    one[0, 7] = 1
    assert torch.allclose(features.direction(7), (features.decode(one) - features.decode(torch.zeros(1, N)))[0], atol=1e-6)


def test_a_cross_layer_transcoder_s_layer(tmp_path):
    made = feature_folders.cross_layer(tmp_path, DIM, N, n_layers=3)
    with pytest.raises(RequestError, match="has a cross-layer transcoder: pass layer="):
        study.open_features(made.path)
    features = study.open_features(made.path, layer=1)
    assert features.reads == "layers.1.ffn.norm"
    assert features.writes == ("layers.1.ffn.output", "layers.2.ffn.output")
    x = np.random.default_rng(1).normal(size=(5, DIM)).astype("f4")
    expected = made.encode(1, x)
    np.testing.assert_allclose(features.encode(torch.from_numpy(x)), expected, atol=1e-5)
    np.testing.assert_allclose(
        features.decode(features.encode(torch.from_numpy(x))), np.einsum("ns,swd->nwd", expected, made.w_dec[1]), atol=1e-5
    )


# ---- where a dictionary belongs


def renamed(written: Written, name: str) -> Path:
    return written.path.rename(written.path.with_name(name))


def test_the_site_is_given_where_names_do_not_say_it(tmp_path):
    path = renamed(feature_folders.sparsify(tmp_path, DIM, N), "mine")
    with pytest.raises(RequestError, match="does not say its layer: pass layer="):
        study.open_features(path)
    with pytest.raises(RequestError, match="does not say its site: pass site="):
        study.open_features(path, layer=2)
    assert study.open_features(path, layer=2, site="attention").reads == "layers.2.attention.output"
    with pytest.raises(RequestError, match="expected one of residual_pre"):
        study.open_features(path, layer=2, site="mlp")
    with pytest.raises(RequestError, match="expected a whole number from 0"):
        study.open_features(path, layer=True, site="ffn")


def test_words_that_contradict_each_other(tmp_path):
    path = renamed(feature_folders.llama_scope(tmp_path, DIM, N), "Llama3_1-8B-Base-L3R-8x")
    with pytest.raises(RequestError, match=r"layer of .* is not clear: the folder's name says 3, but hyperparams.json says 1"):
        study.open_features(path)
    path = renamed(feature_folders.llama_scope(tmp_path / "b", DIM, N), "Llama3_1-8B-Base-L1M-8x")
    with pytest.raises(RequestError, match=r"site of .* is not clear"):
        study.open_features(path)
    with pytest.raises(RequestError, match="the caller says 4"):
        study.open_features(feature_folders.goodfire(tmp_path, DIM, N).path, layer=4)
    path = feature_folders.transcoders(tmp_path, DIM, N).path.parent
    with pytest.raises(RequestError, match="many layers: pass layer="):
        study.open_features(path)
    assert study.open_features(path, layer=1).reads == "layers.1.ffn.norm"


@pytest.mark.parametrize(
    ("kind", "norms", "threshold", "expected"),
    [("R", {"in": 6.3125, "out": 6.3125}, 0.2021484375, 2.0496), ("TC", {"in": 64.0, "out": 3.390625}, 0.10400390625, 1.9631)],
)
def test_a_llama_scope_threshold_is_in_the_unit_of_the_models_outputs(kind, norms, threshold, expected, tmp_path):
    """Numbers of the published 8x dictionaries of layer 8, whose D is 4096: an R's and a TC's thresholds are much alike."""
    dim = 64  # the norms of 4096 dimensions are 8 times as large
    scaled = {name: norm / 8 for name, norm in norms.items()}
    written = feature_folders.llama_scope(
        tmp_path, dim, N, kind=kind, dataset_average_activation_norm=scaled, jump_relu_threshold=threshold
    )
    features = study.open_features(written.path)
    assert float(features.activation.least) == pytest.approx(expected, rel=1e-4)


def test_a_folder_of_folders_names_them(tmp_path):
    for name in ("layers.1", "layers.2"):
        feature_folders.sparsify(tmp_path, DIM, N, name=name)
    with pytest.raises(CheckpointError, match=r"did you mean one of its folders layers\.1, layers\.2\?"):
        study.open_features(tmp_path)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        study.open_features(tmp_path / "none")


def test_how_many_features_of_a_topk_transcoder_fire(tmp_path):
    """The config's TopK needs a k, which is in a file or passed by the caller."""
    written = feature_folders.transcoders(tmp_path, DIM, N)
    config = written.path.with_name("config.yaml")
    config.write_text(config.read_text() + "activation: topk\n")
    with pytest.raises(RequestError, match="pass k="):
        study.open_features(written.path)
    features = study.open_features(written.path, k=3)
    assert features.active(torch.ones(4, DIM)).counts().tolist() == [3] * 4
    config.write_text(config.read_text() + "k: 2  # of them\n")
    for k in (None, 2):
        assert study.open_features(written.path, k=k).active(torch.ones(4, DIM)).counts().tolist() == [2] * 4
    with pytest.raises(RequestError, match=r"k is 3, but in .* the 2 largest features of each token fire: leave k out"):
        study.open_features(written.path, k=3)


@pytest.mark.parametrize("name", FORMATS)
def test_a_k_that_the_features_do_not_go_by_is_refused(name, tmp_path):
    with pytest.raises(RequestError, match=r"k is 7, but in .* fire.*: leave k out"):
        study.open_features(FORMATS[name](tmp_path, DIM, N).path, k=7)


def test_sizes_that_the_config_says_are_checked(tmp_path):
    path = feature_folders.sparsify(tmp_path, DIM, N).path
    config = json.loads((path / "cfg.json").read_text())
    (path / "cfg.json").write_text(json.dumps(config | {"expansion_factor": 3}))
    with pytest.raises(CheckpointError, match=r"says 48 features .* encoder.weight is \(64, 16\)"):
        study.open_features(path)
