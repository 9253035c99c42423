"""A conversion copies only checked files: none from outside the folder, none damaged or invalid."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from folders import tiny_folder
from llama_ref.checkpoint.integrity import verify, write_checklist
from llama_ref.checkpoint.writing.convert import to_hugging_face, to_meta
from llama_ref.checkpoint.writing.quantized_writer import quantize_folder
from llama_ref.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("settled")

SETTINGS = (
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
)
WRITERS: dict[str, Callable] = {
    "hf": to_hugging_face,
    "meta": to_meta,
    "reshard": partial(to_meta, shards=2),
    "quantize": partial(quantize_folder, scheme="int8"),
}


@pytest.fixture
def secrets(tmp_path) -> Path:
    path = tmp_path / "secrets.json"
    path.write_text('{"password": "swordfish", "chat_template": "swordfish"}')
    return path


@pytest.fixture
def meta(tmp_path) -> Path:
    return tiny_folder(tmp_path / "meta")


@pytest.fixture
def hf(meta, tmp_path) -> Path:
    return to_hugging_face(meta, tmp_path / "hf")


def replaced(path: Path, make: Callable[[Path], object]) -> Path:
    """The folder, with the file replaced and an up-to-date list."""
    path.unlink(missing_ok=True)
    make(path)
    (path.parent / "checklist.chk").unlink(missing_ok=True)
    return path.parent


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("write", ["hf", "meta"])
def test_a_link_out_of_the_folder_is_not_followed(hf, tmp_path, secrets, name, write):
    replaced(hf / name, lambda path: path.symlink_to(secrets))
    with pytest.raises(CheckpointError, match=f"{name}: a link leads out of the folder, to .*secrets.json"):
        WRITERS[write](hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("write", WRITERS)
def test_neither_from_a_folder_in_metas_format(meta, tmp_path, secrets, name, write):
    replaced(meta / name, lambda path: path.symlink_to(secrets))
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        WRITERS[write](meta, tmp_path / "out")


def test_links_within_the_folder_and_into_a_hub_caches_blobs_are_followed(hf, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in hf.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    (snapshot / "special_tokens_map.json").symlink_to("generation_config.json")
    out = to_hugging_face(snapshot, tmp_path / "out")
    assert (out / "special_tokens_map.json").read_bytes() == (blobs / "generation_config.json").read_bytes()
    assert not any(path.is_symlink() for path in out.iterdir())


def sparse(path: Path, size: int = 1 << 40) -> None:
    with path.open("wb") as file:
        file.write(b'{"a":')
        file.truncate(size)


WRONG_KINDS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a device": ("tokenizer_config.json", lambda path: path.symlink_to("/dev/zero"), "leads out of the folder, to /dev/zero"),
    "a pipe": ("generation_config.json", os.mkfifo, "not a plain file"),
    "a terabyte": ("special_tokens_map.json", sparse, "is larger than"),
    "a template of a terabyte": ("chat_template.jinja", sparse, "is larger than"),
    "a template that is no text": (
        "chat_template.jinja",
        lambda path: path.write_bytes(b"\xff\xfe\x00\xd8"),
        "not text in UTF-8",
    ),
    "a web page": ("tokenizer_config.json", lambda path: path.write_text("<!DOCTYPE html>"), "is an HTML page"),
    "broken JSON": ("tokenizer_config.json", lambda path: path.write_text('{"a": '), "is not valid JSON"),
    "a list": ("tokenizer_config.json", lambda path: path.write_text("[1]"), "is not a JSON object"),
    "a link that leads nowhere": ("tokenizer_config.json", lambda path: path.symlink_to("gone.json"), "it does not exist"),
    "a tokenizer of a terabyte": ("tokenizer.model", sparse, "is larger than"),
}


@pytest.mark.parametrize("kind", WRONG_KINDS)
def test_what_is_not_its_kind_is_refused_before_anything_is_written(hf, tmp_path, kind):
    name, make, says = WRONG_KINDS[kind]
    replaced(hf / name, make)
    with pytest.raises(CheckpointError, match=says):
        to_hugging_face(hf, tmp_path / "out", verify="never")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["auto", "always"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "tokenizer.json"])
def test_a_damaged_file_gets_no_true_sum(hf, tmp_path, name, mode):
    content = json.loads((hf / name).read_text())
    write_checklist(hf, force=True)
    (hf / name).write_text(json.dumps(content | {"added": "later"}))
    assert not verify(hf).ok
    with pytest.raises(CheckpointError, match=f"{name} does not match checklist.chk"):
        to_hugging_face(hf, tmp_path / "out", verify=mode)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write", WRITERS)
def test_neither_does_a_damaged_template_beside_metas_files(meta, tmp_path, write):
    (meta / "chat_template.jinja").write_text("{{ messages }}")
    write_checklist(meta, force=True)
    (meta / "chat_template.jinja").write_text("{{ message }}")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja does not match checklist.chk"):
        WRITERS[write](meta, tmp_path / "out")


def test_what_the_list_does_not_name_is_carried_over_unless_all_is_to_be_verified(meta, tmp_path):
    (meta / "chat_template.jinja").write_text("{{ messages }}")
    assert (to_meta(meta, tmp_path / "out") / "chat_template.jinja").read_text() == "{{ messages }}"
    with pytest.raises(CheckpointError, match=r"does not name chat_template\.jinja"):
        to_meta(meta, tmp_path / "all", verify="always")


def test_settings_that_change_while_they_are_carried_over_are_reported(hf, tmp_path):
    def change(done: int, total: int) -> None:
        (hf / "generation_config.json").write_text("{}")

    (hf / "checklist.chk").unlink()
    with pytest.raises(CheckpointError, match=r"generation_config\.json changed while it was read"):
        to_hugging_face(hf, tmp_path / "out", progress=change)
    assert not (tmp_path / "out").exists()
