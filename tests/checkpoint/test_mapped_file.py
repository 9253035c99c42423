"""Mapped files may be larger than memory, and are never changed."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

from folders import tiny_folder
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.checkpoint.mapped_file import map_file
from llama_ref.checkpoint.writing.convert import to_hugging_face
from llama_ref.errors import CheckpointError


def mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return map_file(file)


def refuses_what_exceeds_memory() -> bool:
    path = Path("/proc/sys/vm/overcommit_memory")
    return path.exists() and path.read_text().strip() == "0"


@pytest.mark.skipif(not refuses_what_exceeds_memory(), reason="overcommit is always allowed or never")
def test_a_file_larger_than_memory_is_mapped(tmp_path):
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
    path = tmp_path / "large"
    n_bytes = fields["MemTotal"] + fields["SwapTotal"] + (1 << 30)
    with path.open("wb") as file:
        file.truncate(n_bytes)  # sparse
        file.seek(n_bytes - 3)
        file.write(b"end")
    with pytest.raises(RuntimeError, match="Cannot allocate memory"):
        torch.UntypedStorage.from_file(str(path), shared=False, nbytes=n_bytes)
    memory = mapped(path)
    assert len(memory) == n_bytes
    assert memory[:2] == b"\0\0" and memory[-3:] == b"end"


def test_a_change_stays_in_this_process(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"as it was")
    memory = mapped(path)
    memory[:2] = b"AS"
    assert memory[:] == b"AS it was" and path.read_bytes() == b"as it was"


def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file cannot be mapped"):
        mapped(tmp_path / "file")


@pytest.mark.skipif(sys.platform != "linux", reason="MAP_NORESERVE is only used on Linux")
@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_weights_are_mapped_without_reserving_memory(tmp_path, form):
    folder = tiny_folder(tmp_path / "tiny")
    if form == "safetensors":
        folder = to_hugging_face(folder, tmp_path / "hf")
    opened = open_folder(folder)
    model = load_model(opened, opened.read_args())
    flags = _flags(opened.shards[0].resolve())
    assert flags and all("nr" in some for some in flags)
    assert model.output.weight.is_cpu  # keeps the file mapped until here


def _flags(path: Path) -> list[list[str]]:
    """The kernel's flags for every mapping of a file."""
    found, is_wanted = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            is_wanted = bool(rest) and rest[-1] == str(path)
        elif first == "VmFlags:" and is_wanted:
            found.append(rest)
    return found
