"""A small file that is far too large is refused before it is read or hashed."""

import os
import shutil
import time
from pathlib import Path

import pytest

from folders import tiny_folder
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.formats.atomic import write_sums
from llama_ref.checkpoint.integrity import verify, write_checklist
from llama_ref.checkpoint.loading.first_load import verified
from llama_ref.checkpoint.size_limits import LIMIT_BYTES
from llama_ref.checkpoint.writing.convert import to_hugging_face
from llama_ref.errors import CheckpointError

PROMPTLY_SECONDS = 10  # hashing a terabyte takes half an hour
TERABYTE = 1 << 40
META = ["params.json", "tokenizer.model", "added_tokens.json", "generation_config.json", "chat_template.jinja", "checklist.chk"]
HUGGING_FACE = [name for name in LIMIT_BYTES if name not in ("params.json", "tokenizer.model")]
CASES = [("meta", name) for name in META] + [("hf", name) for name in HUGGING_FACE]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    meta = tiny_folder(tmp_path_factory.mktemp("whole") / "meta")
    return {"meta": meta, "hf": to_hugging_face(meta, meta.with_name("hf"))}


@pytest.fixture
def folder(whole, tmp_path, form, name) -> Path:
    """A folder with one file of a terabyte; all files are on the list, and old."""
    folder = Path(shutil.copytree(whole[form], tmp_path / "folder"))
    (folder / name).touch()
    write_sums(folder, {each.name for each in folder.iterdir()} - {"checklist.chk"})
    os.truncate(folder / name, TERABYTE)
    os.utime(folder / name, (0, 0))  # `verify` waits a moment for new files, which may be growing
    return folder


@pytest.mark.parametrize(("form", "name"), CASES)
def test_verify_and_checksum_name_the_limit_at_once(folder, name):
    begun = time.monotonic()
    report = verify(folder)
    assert [file.name for file in report.bad] == [name]
    assert f"larger than {LIMIT_BYTES[name]:,} bytes" in report.summary()
    if name != "checklist.chk":  # which `checksum` replaces
        with pytest.raises(CheckpointError, match=f"{name} .*larger than {LIMIT_BYTES[name]:,} bytes"):
            write_checklist(folder, force=True)
    assert time.monotonic() - begun < PROMPTLY_SECONDS


LOADED = [
    *(("meta", name) for name in ("params.json", "tokenizer.model", "added_tokens.json", "checklist.chk")),
    *(("hf", name) for name in ("config.json", "tokenizer.json", "checklist.chk")),
]


@pytest.mark.parametrize(("form", "name"), LOADED)
@pytest.mark.parametrize("how", ["auto", "always"])
def test_loading_names_the_limit_at_once(folder, name, how, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    begun = time.monotonic()
    opened = open_folder(folder)
    with (
        pytest.raises(CheckpointError, match=f"{name} is larger than {LIMIT_BYTES[name]:,} bytes"),
        verified(opened, how, opened.tokenizer),
    ):
        pytest.fail("nothing is loaded")
    assert time.monotonic() - begun < PROMPTLY_SECONDS
