"""Vision folders in Hugging Face's format: loaded, checked, converted both ways, compared, quantized."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import exit_code
from folders import tiny_folder
from llama_ref.checkpoint.diff import compare
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.hf.chat_template import chat_template
from llama_ref.checkpoint.hf.layout import is_tile_table
from llama_ref.checkpoint.hf.names import hf_name
from llama_ref.checkpoint.hf.vision.tile_tables import in_grids
from llama_ref.checkpoint.integrity import verify
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.checkpoint.writing.convert import to_hugging_face, to_meta
from llama_ref.checkpoint.writing.quantized_writer import quantize_folder
from llama_ref.errors import CheckpointError
from llama_ref.generation import Llama
from llama_ref.model import Transformer
from llama_ref.parallel.sharding import Share
from vision_folders import IMAGE_ID, PARAMS, noise, vision_folder

pytestmark = pytest.mark.usefixtures("settled")

TABLE = "vision_model.gated_positional_embedding.tile_embedding.weight"
GATE = "language_model.model.layers.4.cross_attn_attn_gate"


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    return vision_folder(tmp_path_factory.mktemp("vision") / "native", shards=2)


@pytest.fixture(scope="module")
def converted(native) -> Path:
    return to_hugging_face(native, native.with_name("hf"))


@pytest.fixture
def folder(converted, tmp_path) -> Path:
    copy = shutil.copytree(converted, tmp_path / "hf")
    (copy / "checklist.chk").unlink()
    return copy


def load(folder: Path, **options) -> Transformer:
    opened = open_folder(folder)
    return load_model(opened, opened.read_args(), **options)


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether they are equal, except for vectors of tiles that no image uses."""
    used = {name: in_grids(tensor) if is_tile_table(name) else tensor for name, tensor in expected.items()}
    return found.keys() == used.keys() and all(torch.equal(found[name], tensor) for name, tensor in used.items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.float32},
        {"in_memory": True},
        {"quantize": "int8"},
        {"share": Share(1, 2)},
        {"share": Share(0, 1, 1, 2)},
    ],
    ids=str,
)
def test_the_model_is_that_of_the_native_folder(native, converted, options):
    found, expected = (
        {name: tensor for name, tensor in load(folder, **options).state_dict().items() if not tensor.is_meta}
        for folder in (converted, native)
    )
    assert same(found, expected)


def test_matrices_are_the_files_pages_but_those_in_another_order(converted):
    model = load(converted)
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines() if str(converted) in line]
    pages = [range(*(int(end, 16) for end in each[0].split("-"))) for each in maps]
    copies = [name for name, each in model.named_parameters() if not any(each.data_ptr() in page for page in pages)]
    assert all(is_tile_table(name) or re.fullmatch(r"layers\.\d\.attention\.w[qk]\.weight", name) for name in copies)
    assert len(copies) == 3 + 2 * PARAMS["n_layers"]


def test_the_command_line_converts_there_and_back(native, tmp_path, capsys):
    hf, back, again = tmp_path / "hf", tmp_path / "back", tmp_path / "again"
    assert exit_code(["convert", str(native), str(hf), "--to", "hf", "--max_shard_size", "2MB"]) == 0
    assert exit_code(["convert", str(hf), str(back), "--to", "meta", "--shards", "2"]) == 0
    assert exit_code(["convert", str(back), str(again), "--to", "hf", "--max_shard_size", "2MB"]) == 0
    assert len(list(hf.glob("*.safetensors"))) > 1
    assert {path.name: path.read_bytes() for path in hf.iterdir()} == {path.name: path.read_bytes() for path in again.iterdir()}
    for number in range(2):
        name = f"consolidated.{number:02d}.pth"
        expected = {own.removeprefix("text_model."): tensor for own, tensor in torch.load(native / name).items()}
        assert same({own.removeprefix("text_model."): tensor for own, tensor in torch.load(back / name).items()}, expected)
    for each in (hf, back):
        assert exit_code(["verify", str(each), "--deep"]) == 0
    capsys.readouterr()
    assert exit_code(["info", str(hf), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert exit_code(["info", str(native), "--json"]) == 0
    of_native = json.loads(capsys.readouterr().out)
    same_in_both = ("parameters", "vision", "ffn_dim", "n_layers", "tied_output", "weight_bytes")
    assert {key: said[key] for key in same_in_both} == {key: of_native[key] for key in same_in_both}


def test_shapes_that_config_json_gives_come_back(native, converted, tmp_path):
    back = open_folder(to_meta(converted, tmp_path / "back")).read_args()
    args = open_folder(native).read_args()
    for name in ("cross_layers", "ffn_dim", "vision_kept_layers", "vision_dim", "vision_n_layers", "vision_chunk_size"):
        assert getattr(back, name) == getattr(args, name)


def test_diff_ignores_only_vectors_that_no_image_uses(native, converted, folder):
    assert not compare(native, converted).tensors
    args = open_folder(folder).read_args()
    own = "vision_model.vision_encoder.pre_tile_pos_embed.embedding"

    def move_fourth_row_s_last_tile(tensors: dict[str, Tensor]) -> None:
        tensors[hf_name(own, args)].view(9, 4, -1)[8, 3] += 1

    rewrite(folder, move_fourth_row_s_last_tile)
    assert [each.name for each in compare(native, folder).tensors] == [own]
    other = to_meta(converted, folder.with_name("zeros"))
    assert {each.name for each in compare(native, other).tensors} == set(filter(is_tile_table, load(native).state_dict()))


def test_an_image_is_answered_to_as_by_the_native_folder(native, converted):
    answers = []
    for folder in (native, converted):
        llama = Llama.build(folder, max_seq_len=64, device="cpu", dtype="float32")
        dialog = [{"role": "user", "content": [{"type": "image", "image": noise(90, 50)}, {"type": "text", "text": "?"}]}]
        assert IMAGE_ID in llama.encode(dialog)
        answers.append(llama.chat_completion([dialog], max_gen_len=8, temperature=0))
    assert answers[0] == answers[1]


def change_a_copy(tensors: dict[str, Tensor]) -> None:
    tensors[TABLE][2, 0] += 1


CHANGES = {
    "a missing gate": (lambda t: t.pop(GATE), rf"{GATE} is missing"),
    "a table of another tile": (
        lambda t: t.update({TABLE: torch.ones(9, 4 * 26 * 128)}),
        r"tile_embedding.weight has shape \(9, 13312\), expected \(9, 8704\)",
    ),
    "a matrix for a kernel": (
        lambda t: t.update({"vision_model.patch_embedding.weight": torch.ones(128, 588)}),
        r"patch_embedding.weight has shape \(128, 588\), expected \(128, 3, 14, 14\)",
    ),
    "an embedding without the last rows": (
        lambda t: t.update({"language_model.model.embed_tokens.weight": torch.ones(512, 64)}),
        r"embed_tokens.weight has shape \(512, 64\), expected \(520, 64\)",
    ),
    "a stranger": (lambda t: t.update({"vision_model.extra": torch.ones(2)}), "vision_model.extra .*is unexpected"),
    "int8": (
        lambda t: t.update({"language_model.model.layers.0.mlp.up_proj.SCB": torch.ones(2)}),
        r"up_proj.SCB .*is unexpected",
    ),
}


@pytest.mark.parametrize(("change", "says"), CHANGES.values(), ids=CHANGES)
def test_tensors_that_do_not_fit_are_named_by_load_verify_and_diff(folder, converted, change, says):
    rewrite(folder, change)
    for look in (load, lambda path: compare(path, converted)):
        with pytest.raises(CheckpointError, match=says):
            look(folder)
    assert any(re.search(says.replace(" .*", ".*"), file.detail or "") for file in verify(folder).bad)


def test_tables_that_differ_between_grids_are_refused_and_nothing_is_written(folder, tmp_path, capsys):
    rewrite(folder, change_a_copy)
    says = rf"{TABLE} has another vector for a tile in the grid of 1 × 2 tiles"
    with pytest.raises(CheckpointError, match=says):
        load(folder)
    assert exit_code(["convert", str(folder), str(tmp_path / "out"), "--to", "meta"]) == 1
    assert re.search(says, capsys.readouterr().err) and not (tmp_path / "out").exists()


def test_quantized_folders_are_refused_by_name(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(CheckpointError, match=r'"quantization_config" is .*bitsandbytes.*, expected none: its weights'):
        load(folder)


def test_weights_of_the_other_kind_of_model_are_named(folder, tmp_path):
    text = to_hugging_face(tiny_folder(tmp_path / "text"), tmp_path / "text in safetensors")
    (text / "checklist.chk").unlink()
    shutil.copy(text / "model.safetensors", tmp_path)
    shutil.copy(folder / "model.safetensors", text)
    shutil.copy(tmp_path / "model.safetensors", folder)
    for path, held, described in ((text, "vision", "text"), (folder, "text", "vision")):
        with pytest.raises(CheckpointError, match=f"they are a {held} model's, but config.json describes a {described} model"):
            load(path)


def test_wrapped_names_are_told_from_the_prefix_of_the_text_model(folder):
    rewrite(folder, lambda tensors: [tensors.update({f"module.{name}": tensors.pop(name)}) for name in list(tensors)])
    with pytest.raises(CheckpointError, match=r"save them again without 'module\.' \(DistributedDataParallel adds"):
        load(folder)


@pytest.mark.parametrize("scheme", ["int8", "int4:group=32"])
def test_a_quantized_folder_is_that_of_the_native_one(native, converted, tmp_path, scheme):
    written = [quantize_folder(path, tmp_path / path.name, scheme, calibrate=False) for path in (native, converted)]
    expected, found = (load(path).state_dict() for path in written)
    assert same(found, expected)
    assert verify(written[1]).ok


def test_a_tied_output_is_written_as_a_matrix_of_its_own(tmp_path):
    source = vision_folder(tmp_path / "tied", tied=True)
    folder = to_hugging_face(source, tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(tensors["language_model.lm_head.weight"], tensors["language_model.model.embed_tokens.weight"][:512])
    model = load(folder)
    assert verify(folder).ok and model.output.weight.data_ptr() != model.tok_embeddings.weight.data_ptr()


def test_a_base_model_has_no_chat_template(tmp_path):
    folder = to_hugging_face(vision_folder(tmp_path / "Llama3.2-11B-Vision"), tmp_path / "hf")
    assert not (folder / "chat_template.json").exists()
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())


def test_the_template_is_kept_where_processors_look_for_it(converted, tmp_path):
    vocabulary = open_folder(converted).open_tokenizer(open_folder(converted).read_args()).vocabulary
    written = json.loads((converted / "chat_template.json").read_text())["chat_template"]
    assert written == chat_template(vocabulary, images=True) != chat_template(vocabulary)
    copied = to_hugging_face(converted, tmp_path / "copied", max_shard_bytes=10**6)
    names = {path.name for path in converted.iterdir()} - {"model.safetensors"}
    assert names < {path.name for path in copied.iterdir()}


def test_ends_named_in_the_text_models_section_are_followed(folder):
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", text_config=config["text_config"] | {"eos_token_id": 500})
    edit(folder / "tokenizer_config.json", eos_token=None)
    opened = open_folder(folder)
    assert 500 in opened.open_tokenizer(opened.read_args()).stop_tokens
