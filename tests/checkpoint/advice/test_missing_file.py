"""Hints about a missing file: an unfinished download, or a browser's or a copy's other name."""

import shutil
import unicodedata
from pathlib import Path

import pytest

from folders import tiny_folder
from llama_ref.checkpoint.advice.missing_file import hint_about
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.integrity import verify
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.errors import CheckpointError

LAST = "consolidated.01.pth"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("whole") / "model", shards=2)


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


def load(path: Path) -> None:
    opened = open_folder(path)
    args = opened.read_args()
    load_model(opened, args)
    opened.open_tokenizer(args)


@pytest.mark.parametrize(
    ("missing", "here"),
    [
        (LAST, "consolidated.01 (1).pth"),
        (LAST, "consolidated.01 - 복사본.pth"),
        (LAST, unicodedata.normalize("NFD", "consolidated.01 사본.pth")),  # in macOS's Unicode form
        (LAST, "consolidated.01 copy 2.pth"),
        (LAST, "Copy of consolidated.01.pth"),
        (LAST, "consolidated.1.pth"),
        (LAST, "Consolidated.01.PTH"),
        ("tokenizer.model", "tokenizer.model.1"),
        ("params.json", "params.json.txt"),
        ("model-00002-of-00004.safetensors", "model-00002-of-00004(1).safetensors"),
    ],
)
def test_a_copys_name_is_recognized(tmp_path, missing, here):
    (tmp_path / here).touch()
    assert hint_about(tmp_path / missing) == f"{here} may be it: if so, rename it"


@pytest.mark.parametrize(
    "here", ["consolidated.02.pth", "consolidated.11.pth", "consolidated.01.pth.md5", "my consolidated.01.pth", "params.json"]
)
def test_another_file_is_no_copy(tmp_path, here):
    (tmp_path / here).touch()
    assert hint_about(tmp_path / LAST) == ""


@pytest.mark.parametrize("missing", ["consolidated.00.pth", LAST, "params.json", "tokenizer.model"])
def test_verify_and_loading_name_the_renamed_file(folder, missing):
    other = f"{missing}.1"
    (folder / missing).rename(folder / other)
    hint = rf"{missing} .*\({other} may be it: if so, rename it\)"
    with pytest.raises(CheckpointError, match=rf"lacks {hint}"):
        load(folder)
    assert f"{missing} is missing ({other} may be it: if so, rename it): fetch it" in verify(folder).summary()


@pytest.mark.parametrize("has_list", [True, False])
def test_a_last_shard_that_is_missing_is_named(folder, has_list):
    (folder / LAST).unlink()
    if not has_list:
        (folder / "checklist.chk").unlink()
    with pytest.raises(CheckpointError, match=f"lacks {LAST}: the shapes of the tensors imply 2 shards; fetch what is missing"):
        load(folder)


def test_a_first_download_that_is_not_finished_is_named(folder):
    for name in ("consolidated.00.pth", LAST):
        (folder / name).rename(folder / f"{name}.part")
    with pytest.raises(CheckpointError, match=r"lacks consolidated.00.pth \(its download has not finished: .*\); fetch it"):
        open_folder(folder)


def test_our_own_unfinished_download_is_to_be_gone_on_with(tmp_path):
    (tmp_path / "consolidated.00.pth.part").write_bytes(bytes(1000))
    (tmp_path / "consolidated.00.pth.part.json").write_text("{}")
    assert "`llama-ref download` resumes it" in hint_about(tmp_path / "consolidated.00.pth")
