"""Vision releases on disk: loaded, checked, resharded, compared, quantized, in little memory."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_ref.checkpoint.diff import compare
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.integrity import verify
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.checkpoint.shapes import expected_shapes, name_in_shards, shard_shape
from llama_ref.checkpoint.writing.convert import to_meta
from llama_ref.checkpoint.writing.quantized_writer import quantize_folder
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.model import Transformer
from llama_ref.quantization.apply import quantized_bytes
from vision_folders import PARAMS, vision_folder

pytestmark = pytest.mark.usefixtures("settled")

SHARDS = (1, 2, 8)
# How Meta's shards split the 90B's tensors, according to the converters.
SPLIT = {
    "vision_model.vision_encoder.conv1._linear.weight": 0,
    "vision_model.vision_encoder.transformer.resblocks.0.attn.wq.weight": 0,
    "vision_model.vision_encoder.transformer.resblocks.0.attn.wo.weight": 1,
    "vision_model.vision_encoder.global_transformer.resblocks.1.mlp.c_fc.weight": 0,
    "vision_model.vision_encoder.global_transformer.resblocks.1.mlp.c_fc.bias": 0,
    "vision_model.vision_encoder.global_transformer.resblocks.1.mlp.c_proj.weight": 1,
    "vision_model.vision_encoder.global_transformer.resblocks.1.mlp.c_proj.bias": None,
    "vision_model.vision_encoder.gated_positional_embedding": None,
    "vision_model.vision_encoder.ln_pre.bias": None,
    "vision_model.vision_projection.weight": 0,
    "vision_model.vision_projection.bias": 0,
    "text_model.learnable_embedding.weight": 0,
    "text_model.tok_embeddings.weight": 0,
    "text_model.output.weight": 0,
    "text_model.norm.weight": None,
    "text_model.cross_attention_layers.1.attention.wk.weight": 0,
    "text_model.cross_attention_layers.1.attention.wo.weight": 1,
    "text_model.cross_attention_layers.1.attention.q_norm.weight": None,
    "text_model.cross_attention_layers.1.feed_forward.w2.weight": 1,
    "text_model.cross_attention_layers.1.gate_attn": None,
    "text_model.layers.5.feed_forward.w3.weight": 0,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("vision")
    return {n: vision_folder(root / f"of {n}", shards=n, dtype=torch.float32) for n in SHARDS}


@pytest.fixture
def folder(tmp_path) -> Path:
    return vision_folder(tmp_path / "vision")


def shard(folder: Path, number: int = 0) -> dict[str, Tensor]:
    return torch.load(folder / f"consolidated.{number:02d}.pth")


def load(folder: Path, **options) -> Transformer:
    opened = open_folder(folder)
    return load_model(opened, opened.read_args(), dtype=torch.float32, **options)


@pytest.mark.parametrize("n_shards", SHARDS)
def test_shards_hold_metas_names_and_parts(folders, n_shards):
    args = open_folder(folders[n_shards]).read_args()
    wholes = {name_in_shards(name, args): (name, shape) for name, shape in expected_shapes(args).items()}
    whole = shard(folders[1])
    for number in {0, n_shards - 1}:
        held = shard(folders[n_shards], number)
        assert held.keys() == wholes.keys()
        for name, (own, shape) in wholes.items():
            assert held[name].shape == shard_shape(own, shape, n_shards)
        for name, dim in SPLIT.items():
            part = whole[name] if dim is None else whole[name].chunk(n_shards, dim)[number]
            assert torch.equal(held[name], part), name


def test_any_number_of_shards_gives_the_same_model(folders):
    models = {n: load(folder).state_dict() for n, folder in folders.items()}
    for n in SHARDS:
        assert models[n].keys() == models[1].keys() == expected_shapes(open_folder(folders[1]).read_args()).keys()
        assert all(torch.equal(models[n][name], tensor) for name, tensor in models[1].items())


def test_a_model_of_one_shard_is_the_files_pages(folders):
    model = load(folders[1])
    assert not any(parameter.is_meta for parameter in model.parameters())
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines() if str(folders[1]) in line]
    pages = [range(*(int(end, 16) for end in each[0].split("-"))) for each in maps]
    assert all(any(parameter.data_ptr() in each for each in pages) for parameter in model.parameters())


@pytest.mark.parametrize("n_shards", SHARDS)
@pytest.mark.parametrize("written", SHARDS)
def test_resharding_gives_the_files_of_that_number(folders, tmp_path, n_shards, written):
    made = to_meta(folders[n_shards], tmp_path / "out", shards=written)
    assert verify(made).ok
    for number in range(written):
        found, expected = shard(made, number), shard(folders[written], number)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_number_of_shards_that_does_not_divide_is_refused(folders, tmp_path):
    with pytest.raises(
        RequestError, match=r"16 shards cannot hold equal parts of .*the vision encoder.*take one of 1, 2, 4, 8$"
    ):
        to_meta(folders[1], tmp_path / "out", shards=16)


@pytest.mark.parametrize("n_shards", SHARDS)
def test_whole_folders_are_whole(folders, n_shards):
    report = verify(folders[n_shards], deep=True)
    assert report.ok and not report.notes


def rewrite(folder: Path, change) -> None:
    tensors = shard(folder)
    change(tensors)
    torch.save(tensors, folder / "consolidated.00.pth")
    (folder / "checklist.chk").unlink()


TEXT_KEYS = {key: value for key, value in PARAMS.items() if not key.startswith("vision_")}


def drop_prefix(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensor = tensors.pop(name)
        if name.startswith("text_model.") and "cross" not in name and "learnable" not in name:
            tensors[name.removeprefix("text_model.")] = tensor


CHANGES = {
    "a missing gate": (lambda t: t.pop("text_model.cross_attention_layers.0.gate_attn"), r"gate_attn is missing"),
    "a long gate": (
        lambda t: t.update({"text_model.cross_attention_layers.0.gate_attn": torch.ones(64)}),
        r"gate_attn has shape \(64,\), expected \(1,\)",
    ),
    "another tile": (
        lambda t: t.update({"vision_model.vision_encoder.positional_embedding": torch.ones(26, 128)}),
        r"positional_embedding has shape \(26, 128\), expected \(17, 128\)",
    ),
    "a stranger": (lambda t: t.update({"text_model.extra": torch.ones(2)}), "extra .*is unexpected|extra"),
    "a name without prefix": (
        lambda t: t.update({"norm.weight": t.pop("text_model.norm.weight")}),
        r"norm.weight is missing|without prefix",
    ),
    "a text model": (drop_prefix, "it holds a text model only, but params.json has the keys of a vision release"),
}


@pytest.mark.parametrize(("change", "says"), CHANGES.values(), ids=CHANGES)
def test_tensors_that_do_not_fit_are_named_by_load_and_verify(folder, change, says):
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=says):
        load(folder)
    report = verify(folder)
    assert not report.ok
    assert any(re.search(says, file.detail or "") for file in report.bad), [file.detail for file in report.bad]


def test_params_of_a_text_model_are_named(folder):
    (folder / "params.json").write_text(json.dumps(TEXT_KEYS))
    says = "it holds a vision model, but params.json has no vision_chunk_size"
    with pytest.raises(CheckpointError, match=says):
        load(folder)
    (folder / "checklist.chk").unlink()
    report = verify(folder)
    assert [file.name for file in report.bad] == ["params.json"] and says in report.bad[0].detail


def test_rope_frequencies_of_older_files_are_ignored(folder):
    rewrite(folder, lambda tensors: tensors.update({"text_model.rope.freqs": torch.ones(4)}))
    load(folder)
    assert not verify(folder).bad


def test_shards_of_two_models_are_told_apart_by_their_position_tables(folders, tmp_path):
    mixed = shutil.copytree(folders[2], tmp_path / "mixed")
    tensors = shard(mixed, 1)
    tensors["vision_model.vision_encoder.class_embedding"] += 1
    torch.save(tensors, mixed / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"hold different copies of vision_model\.vision_encoder\.class_embedding"):
        load(mixed)


def test_diff_compares_any_numbers_of_shards(folders, tmp_path):
    assert not compare(folders[1], folders[8]).tensors
    other = vision_folder(tmp_path / "other", seed=1, dtype=torch.float32)
    names = {each.name for each in compare(folders[2], other).tensors}
    assert "vision_model.vision_projection.bias" in names and "cross_attention_layers.0.gate_attn" in names


@pytest.mark.parametrize("scheme", ["int8", "int4:group=32"])
def test_a_quantized_folder_loads_as_the_source_does_with_quantize(folder, tmp_path, scheme):
    written = quantize_folder(folder, tmp_path / "small", scheme, calibrate=False)
    assert verify(written).ok
    ours, expected = load(written).state_dict(), load(folder, quantize=scheme).state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    assert quantized_bytes(load(written)) > 0


def test_calibration_covers_the_text_layers(folder, tmp_path):
    seen = []
    quantize_folder(
        folder, tmp_path / "small", "int4:group=32", calibrate="some text " * 40, progress=lambda *at: seen.append(at)
    )
    assert seen[-1][0] == seen[-1][1]
    load(tmp_path / "small")
