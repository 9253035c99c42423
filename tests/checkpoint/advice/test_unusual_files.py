"""Folders as trainers and converters leave them: other file names, other tensor names, two models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from folders import tiny_folder
from llama_ref.checkpoint.describe import describe
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.hf.names import hf_name
from llama_ref.checkpoint.integrity import verify
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.checkpoint.writing.convert import to_hugging_face
from llama_ref.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("settled")

META_FILES, HF_FILES = ("params.json", "tokenizer.model"), ("config.json", "tokenizer.json")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """A small model in both formats."""
    meta = tiny_folder(tmp_path_factory.mktemp("sources") / "Meta")
    return {"meta": meta, "hf": to_hugging_face(meta, meta.with_name("HF"))}


@pytest.fixture(scope="module")
def tensors(sources) -> dict[str, torch.Tensor]:
    return torch.load(sources["meta"] / "consolidated.00.pth", weights_only=True)


@pytest.fixture
def hf_tensors(tensors) -> dict[str, torch.Tensor]:
    """The tensors under Hugging Face's names; the order of rows does not matter here."""
    return {hf_name(name): tensor.clone() for name, tensor in tensors.items()}


@pytest.fixture
def folder(sources, tmp_path):
    """A folder with one format's small files."""

    def folder(form: str) -> Path:
        for name in META_FILES if form == "meta" else HF_FILES:
            shutil.copy(sources[form] / name, tmp_path)
        return tmp_path

    return folder


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_folder(path)
    return str(error.value)


@pytest.mark.parametrize("name", ["meta_model_0.pt", "consolidated.pth", "model.pth"])
def test_a_pickle_of_metas_tensors_is_renamed(folder, tensors, name):
    path = folder("meta")
    torch.save(tensors, path / name)
    torch.save({"step": torch.tensor(1)}, path / "optimizer.pt")
    advice = refused(path)
    assert advice.endswith(f"rename {name} to consolidated.00.pth")
    assert advice in verify(path).notes
    (path / name).rename(path / "consolidated.00.pth")
    assert describe(open_folder(path)).dim == 32


def test_of_several_epochs_one_is_chosen_and_params_json_is_asked_for(tmp_path, tensors):
    for epoch in range(2):
        torch.save(tensors, tmp_path / f"meta_model_{epoch}.pt")
    assert refused(tmp_path).endswith(
        "rename one of meta_model_0.pt, meta_model_1.pt to consolidated.00.pth, and put the model's params.json beside it"
    )


@pytest.mark.parametrize(
    ("files", "renamed"),
    [
        (["ft-model-00001-of-00002.safetensors", "ft-model-00002-of-00002.safetensors"], "model-00001-of-00002.safetensors"),
        (["ft-model-00001-of-00001.safetensors"], "model-00001-of-00001.safetensors"),
        (["weights.00.safetensors"], "model.safetensors"),
        (["weights.00.safetensors", "weights.01.safetensors"], "model-00001-of-00002.safetensors"),
    ],
)
def test_safetensors_of_trainers_are_renamed(folder, hf_tensors, files, renamed):
    path = folder("hf")
    names = list(hf_tensors)
    for part, file in enumerate(files):
        save_file({name: hf_tensors[name] for name in names[part :: len(files)]}, path / file)
    more = ", and so on" if len(files) > 1 else ""
    assert refused(path).endswith(f"rename {files[0]} to {renamed}{more}")
    for part, file in enumerate(files, 1):
        (path / file).rename(path / (f"model-{part:05d}-of-{len(files):05d}.safetensors" if "-" in renamed else renamed))
    opened = open_folder(path)
    assert load_model(opened, opened.read_args()).args.dim == 32


def test_tensors_in_the_other_format_are_converted(folder, tensors, hf_tensors):
    path = folder("meta")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / "consolidated.safetensors")
    assert "`torch.save(safetensors.torch.load_file('consolidated.safetensors'), 'consolidated.00.pth')`" in refused(path)
    (path / "consolidated.safetensors").unlink()
    torch.save(hf_tensors, path / "hf_model_0001_0.pt")
    assert "`safetensors.torch.save_file(torch.load('hf_model_0001_0.pt'), 'model.safetensors')`" in refused(path)


@pytest.mark.parametrize(
    ("prefix", "says"),
    [
        ("module.", "without 'module.' (DistributedDataParallel adds 'module.')"),
        ("_orig_mod.", "without '_orig_mod.' (torch.compile adds '_orig_mod.')"),
        ("model.", "without 'model.'"),
    ],
)
@pytest.mark.parametrize("form", ["meta", "hf"])
def test_other_tensor_names_are_shown_with_what_to_do(folder, tensors, hf_tensors, form, prefix, says):
    path = folder(form)
    if form == "meta":
        torch.save({prefix + name: tensor for name, tensor in tensors.items()}, path / "consolidated.00.pth")
    else:
        save_file({prefix + name: tensor for name, tensor in hf_tensors.items()}, path / "model.safetensors")
    opened = open_folder(path)
    with pytest.raises(CheckpointError) as error:
        load_model(opened, opened.read_args())
    assert f"21 tensors have other names, {prefix}" in str(error.value) and str(error.value).endswith(f"save them again {says}")
    if form == "meta":
        with pytest.raises(CheckpointError, match="21 tensors have other names"):
            describe(opened)
        assert "21 tensors have other names" in verify(path, quick=True).summary()


def test_tensors_with_the_other_formats_names_are_told_where_they_go(folder, tensors, hf_tensors):
    path = folder("meta")
    torch.save(hf_tensors, path / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"Hugging Face's names: save them as model\.safetensors"):
        load_model(open_folder(path), open_folder(path).read_args())


def test_of_two_models_the_index_tells_which(folder, hf_tensors):
    path = folder("hf")
    parts = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    names = list(hf_tensors)
    for part, file in enumerate(parts):
        save_file({name: hf_tensors[name] for name in names[part::2]}, path / file)
    save_file(hf_tensors, path / "model.safetensors")
    assert refused(path).endswith("two models; remove one of them")
    index = path / "model.safetensors.index.json"
    for damaged in ("{", "[]", '{"weight_map": 1}', '{"weight_map": {"a": []}}'):
        index.write_text(damaged)
        assert refused(path).endswith("two models; remove one of them")
    index.write_text(json.dumps({"weight_map": {name: parts[i % 2] for i, name in enumerate(names)}}))
    assert refused(path).endswith(f"names {', '.join(parts)}, so remove model.safetensors if the index is right")
