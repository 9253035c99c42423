"""Invalid files: errors are clear, and nothing in the files is executed."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_ref import study
from llama_ref.errors import CheckpointError, RequestError, UnsupportedModel
from study import feature_folders

DIM, N = 8, 16
HTML = b"<!DOCTYPE html><html>Access denied</html>"


def llama_scope_with(tmp_path: Path, **changed: object) -> Path:
    return feature_folders.llama_scope(tmp_path, DIM, N, **changed).path


def change(file: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    edit(tensors)
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    file.unlink()
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn is 'gelu'"),
        ({"act_fn": "topk"}, "act_fn is 'topk' with sparsity_include_decoder_norm"),
        ({"norm_activation": "batch-wise"}, "norm_activation is 'batch-wise'"),
        ({"use_glu_encoder": True}, "use_glu_encoder is true"),
        ({"d_model": "8"}, "d_model is '8', expected a positive whole number"),
        ({"d_model": True}, "d_model is True"),
        ({"d_sae": 1 << 60}, r"says 1152921504606846976 features .* but encoder.weight is \(16, 8\)"),
        ({"d_sae": [16]}, r"but encoder.weight is \(16, 8\)"),
        ({"jump_relu_threshold": None}, "jump_relu_threshold is None"),
        ({"jump_relu_threshold": -1}, "jump_relu_threshold is -1, expected a number from 0"),
        ({"dataset_average_activation_norm": 3}, "lacks dataset_average_activation_norm"),
        ({"dataset_average_activation_norm": {"in": 0, "out": 1}}, "in is 0, expected a positive number"),
        ({"sparsity_include_decoder_norm": "yes"}, "expected true or false"),
        ({"hook_point_in": "blocks.1.hook_z"}, "has the hook 'blocks.1.hook_z', expected one of"),
        ({"hook_point_in": 3}, "hook_point_in is 3, expected a text"),
        ({"hook_point_in": "blocks.2.hook_resid_post"}, "hooks of two layers"),
        ({"hook_point_out": "blocks.1.hook_mlp_out"}, "only autoencoders and transcoders"),
    ],
)
def test_hyperparams_that_are_wrong(changed, message, tmp_path):
    path = llama_scope_with(tmp_path, **changed)
    with pytest.raises((CheckpointError, RequestError), match=message) as error:
        study.open_features(path)
    assert "hyperparams.json" in str(error.value)
    assert isinstance(error.value, UnsupportedModel) == ("not supported" in str(error.value))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("hyperparams.json", HTML, "hyperparams.json is an HTML page"),
        ("hyperparams.json", b"[1]", "holds a list, expected an object"),
        ("hyperparams.json", b"{", "is not valid JSON"),
        ("hyperparams.json", b"{}", "lacks d_model, act_fn, hook_point_in"),
        ("hyperparams.json", b"[" * 100_000, "nested far deeper"),
        ("checkpoints/final.safetensors", HTML, "final.safetensors is an HTML page"),
        ("checkpoints/final.safetensors", b"", "an empty file"),
        ("checkpoints/final.safetensors", b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        ("checkpoints/final.safetensors", None, "cannot read .*final.safetensors"),
    ],
)
def test_files_that_are_something_else(file, content, message, tmp_path):
    path = llama_scope_with(tmp_path)
    (path / file).unlink()
    if content is not None:
        (path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        study.open_features(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("encoder.bias"), "lacks encoder.bias; it has"),
        (lambda t: t.update({"encoder.bias": t["encoder.bias"][:-1]}), r"encoder.bias is \(15,\), expected \(16,\)"),
        (lambda t: t.update({"decoder.weight": t["decoder.weight"].T}), r"decoder.weight is \(16, 8\), expected \(8, 16\)"),
        (lambda t: t.update({"encoder.weight": t["encoder.weight"].int()}), "of torch.int32, expected floating-point"),
        (lambda t: t.update({"encoder.weight": t["encoder.weight"].flatten()}), "expected a tensor of 2 axes"),
        (lambda t: t["encoder.bias"].fill_(float("nan")), "encoder.bias has values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit(edit, message, tmp_path):
    path = llama_scope_with(tmp_path)
    change(path / "checkpoints/final.safetensors", edit)
    with pytest.raises(CheckpointError, match=message):
        study.open_features(path)


def test_matrices_that_are_not_finite_say_so_when_they_are_used(tmp_path):
    """A matrix of gigabytes is not read when it is opened."""
    path = feature_folders.transcoders(tmp_path, DIM, N, skip=True).path
    x = torch.ones(2, DIM)
    for name in ("W_enc", "W_dec", "W_skip"):
        whole = load_file(path)[name].clone()
        change(path, lambda t, name=name: t[name][3].fill_(float("nan")))
        features = study.open_features(path)
        with pytest.raises(CheckpointError, match=r"layer_1.safetensors has values that are not finite in its (enc|dec|skip)"):
            features.decode(features.encode(x) + 1, x)
        change(path, lambda t, name=name, whole=whole: t.update({name: whole}))
    assert study.open_features(path).reconstruct(x).isfinite().all()
    with pytest.raises(RequestError, match="x has values that are not finite"):
        study.open_features(path).encode(torch.full((1, DIM), float("inf")))


class Payload:
    def __reduce__(self):
        return os.system, ("touch /tmp/llama_ref_was_here",)


def test_a_pickle_that_runs_a_program_is_refused(tmp_path):
    good = feature_folders.goodfire(tmp_path, DIM, N).path
    with zipfile.ZipFile(good) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(good, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, pickle.dumps(Payload(), 2) if name.endswith("data.pkl") else data)
    with pytest.raises(CheckpointError, match=r"asks Python to use '\w+\.system'"):
        study.open_features(good)
    good.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match="a bare pickle"):
        study.open_features(good)
    assert not Path("/tmp/llama_ref_was_here").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dict_class": "GatedAutoEncoder"}, "dict_class is 'GatedAutoEncoder', which is not supported"),
        ({"activation_dim": 9}, r"activation_dim is 9, but encoder.weight is \(16, 8\)"),
        ({"layer": "1"}, "layer is '1', expected a whole number"),
        ({"k": 17}, "k is 17, but there are 16 features"),
        ({"submodule_name": "resid_post_layer_2"}, r"is not clear: config\.json says 1, but its submodule_name says 2"),
    ],
)
def test_configs_of_dictionary_learning_that_are_wrong(changed, message, tmp_path):
    path = feature_folders.dictionary_learning(tmp_path, DIM, N, **changed).path
    with pytest.raises((CheckpointError, RequestError), match=message):
        study.open_features(path)


def test_a_config_and_a_file_that_say_another_k(tmp_path):
    path = feature_folders.dictionary_learning(tmp_path, DIM, N, k=4).path
    config = path / "config.json"
    config.write_text(config.read_text().replace('"k": 4', '"k": 3'))
    with pytest.raises(CheckpointError, match=r"k is 3, but ae\.pt says 4"):
        study.open_features(path)
    config.write_text(config.read_text().replace('"k": 3, ', ""))
    assert study.open_features(path).active(torch.randn(1, DIM).abs() * 9).counts().max() <= 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": 17}, "k is 17, but there are 16 features"),
        ({"k": 0}, "k is 0, expected a positive whole number"),
        ({"activation": "groupmax"}, "activation is 'groupmax', which is not supported"),
        ({"transcode": 1}, "transcode is 1, expected true or false"),
        ({"num_latents": 15}, "says 15 features"),
    ],
)
def test_configs_of_sparsify_that_are_wrong(changed, message, tmp_path):
    path = feature_folders.sparsify(tmp_path, DIM, N, **changed).path
    with pytest.raises(CheckpointError, match=message):
        study.open_features(path)


def test_configs_of_transcoders_that_are_wrong(tmp_path):
    path = feature_folders.transcoders(tmp_path, DIM, N).path.parent
    config = path / "config.yaml"
    good = config.read_text()
    config.write_bytes(HTML)
    with pytest.raises(CheckpointError, match="is an HTML page"):
        study.open_features(path, layer=1)
    config.write_text(good + "activation: jump_relu\n")
    with pytest.raises(CheckpointError, match=r"lacks threshold, but config\.yaml says jump_relu"):
        study.open_features(path, layer=1)
    config.write_text(good + "activation: gelu\n")
    with pytest.raises(UnsupportedModel, match="activation is 'gelu'"):
        study.open_features(path, layer=1)
    config.write_text(good)
    with pytest.raises(CheckpointError, match=r"layer_5.safetensors"):
        study.open_features(path, layer=5)
    config.unlink()
    with pytest.raises(RequestError, match="does not say its site: pass site="):
        study.open_features(path, layer=1)
    assert study.open_features(path, layer=1, site="transcoder").reads == "layers.1.ffn.norm"


def test_a_config_json_beside_it_is_not_taken_for_features(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": "x"}))
    with pytest.raises(CheckpointError, match=r"has no features: expected hyperparams\.json"):
        study.open_features(tmp_path)
    for given in (None, 3, "a\0b"):
        with pytest.raises((RequestError, CheckpointError)):
            study.open_features(given)
