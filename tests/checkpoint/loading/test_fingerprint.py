"""Copies of a checkpoint have the same fingerprint, different checkpoints do not."""

import os
import shutil
from io import FileIO
from pathlib import Path

import pytest
import torch

from folders import PARAMS, byte_tokenizer, tiny_folder
from llama_ref.args import ModelArgs
from llama_ref.checkpoint.folder import CheckpointFolder, open_folder
from llama_ref.checkpoint.loading.fingerprint import END_BYTES, SAMPLE_BYTES, SAMPLES, fingerprint
from llama_ref.errors import CheckpointError

ARGS = ModelArgs.from_dict(PARAMS)
LARGE = 4 << 20  # bytes, of which not all are read


def of(path: Path) -> dict[str, object]:
    folder = open_folder(path)
    return fingerprint(folder, folder.read_args(), folder.tokenizer)


def of_weights(path: Path) -> object:
    """The digest of one file of weights."""
    return fingerprint(CheckpointFolder(path.parent, path, (path,), None, None), ARGS, None)[f"the digest of {path.name}"]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tiny_folder(tmp_path / "tiny", shards=2)


def test_a_copy_has_the_same(folder, tmp_path):
    assert of(shutil.copytree(folder, tmp_path / "copy")) == of(folder)


class NetworkFile(FileIO):
    """A file whose reads may return less than requested, as on network file systems."""

    def read(self, size: int | None = -1, /) -> bytes | None:
        return super().read(1000)

    def readinto(self, buffer: bytearray, /) -> int | None:
        return super().readinto(memoryview(buffer)[:1000])


def test_a_file_that_is_read_in_parts_has_the_same(folder, monkeypatch):
    expected = of(folder)
    monkeypatch.setattr("llama_ref.opened_files.FileIO", NetworkFile)
    assert of(folder) == expected


def test_what_differs_is_named(folder, tmp_path):
    other = tiny_folder(tmp_path / "other", shards=2, seed=1)
    byte_tokenizer(other / "tokenizer.model").write_bytes((other / "tokenizer.model").read_bytes() + b"\n")
    ours, theirs = of(folder), of(other)
    assert {name for name in ours if ours[name] != theirs[name]} == {
        *(f"the {what} consolidated.0{n}.pth" for what in ("digest of", "listed md5 of") for n in range(2)),
        "the size of the tokenizer",
        "the digest of the tokenizer",
    }


@pytest.mark.parametrize("at", [0, LARGE // 8 + 12_345, LARGE // 4 - 1], ids=["first", "between samples", "last"])
def test_every_weight_of_a_pth_counts(tmp_path, at):
    """The archive's directory has a checksum of each tensor, wherever the samples are."""
    weights = torch.zeros(LARGE // 4)
    torch.save({"w": weights}, tmp_path / "consolidated.00.pth")
    before = of_weights(tmp_path / "consolidated.00.pth")
    weights[at] = 1
    torch.save({"w": weights}, tmp_path / "consolidated.00.pth")
    assert of_weights(tmp_path / "consolidated.00.pth") != before


def test_a_difference_as_long_as_the_distance_of_samples_is_found(tmp_path):
    path = tmp_path / "model.safetensors"
    distance = -(-(LARGE - 2 * END_BYTES) // (SAMPLES - 1)) + SAMPLE_BYTES
    path.write_bytes(bytes(LARGE))
    before = of_weights(path)
    for start in range(0, LARGE - distance, 7 * distance // 2):
        with path.open("r+b") as file:
            file.seek(start)
            file.write(b"\1" * distance)
        assert of_weights(path) != before
        path.write_bytes(bytes(LARGE))


def test_a_broken_list_is_left_to_loading(folder):
    (folder / "checklist.chk").write_text("<html>")
    assert not [name for name in of(folder) if "listed" in name]


def test_a_pipe_is_refused_not_waited_for(folder):
    (folder / "consolidated.01.pth").unlink()
    os.mkfifo(folder / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth is not a plain file"):
        of(folder)
