"""Checks without reading weights agree with torch and take seconds, whatever the files' size."""

import base64
import collections
import json
import os
import re
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bounds import little_memory_and_time
from llama_ref.args import ModelArgs
from llama_ref.checkpoint.formats.pth import inspect_pth
from llama_ref.checkpoint.formats.pth_length import archive_length
from llama_ref.checkpoint.formats.pth_pickle import ITEM_BYTES
from llama_ref.checkpoint.formats.pth_zip import read_directory
from llama_ref.checkpoint.integrity import verify
from llama_ref.checkpoint.loading.empty_model import model_without_memory
from llama_ref.checkpoint.releases import find_release
from llama_ref.checkpoint.shapes import shard_shape
from llama_ref.checkpoint.verify.report import State
from make_random_checkpoint import make_random_checkpoint

pytestmark = pytest.mark.usefixtures("settled")

DTYPES = [getattr(torch, name) for name in ITEM_BYTES]


@st.composite
def state_dicts(draw) -> dict[str, torch.Tensor]:
    tensors = {}
    for index in range(draw(st.integers(0, 5))):
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        tensor = torch.randint(0, 2, shape).to(draw(st.sampled_from(DTYPES)))
        if draw(st.booleans()) and tensor.dim() == 2:
            tensor = tensor.T
        if draw(st.booleans()) and tensor.dim() and len(tensor) > 1:
            tensor = tensor[1:]
        tensors[f"t{index}"] = torch.nn.Parameter(tensor) if tensor.is_floating_point() and draw(st.booleans()) else tensor
        if draw(st.booleans()):
            tensors[f"shared{index}"] = tensor.view(-1) if tensor.is_contiguous() else tensor
    return collections.OrderedDict(tensors) if draw(st.booleans()) else tensors


@settings(deadline=None)
@given(tensors=state_dicts())
def test_tensors_are_listed_as_torch_loads_them(tmp_path_factory, tensors):
    path = tmp_path_factory.getbasetemp() / "good.pth"
    torch.save(tensors, path)
    data, found = path.read_bytes(), inspect_pth(path)
    loaded = torch.load(path, weights_only=True)
    assert list(found) == list(loaded)
    for name, tensor in loaded.items():
        info = found[name]
        assert (info.shape, info.stride, info.storage_offset) == (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        assert f"torch.{info.dtype}" == str(tensor.dtype) and info.nbytes == tensor.nbytes
        assert info.is_contiguous == tensor.is_contiguous()
        if info.is_contiguous:
            assert data[info.file_offset : info.file_offset + info.nbytes] == raw_bytes(tensor)
    assert archive_length(path) == len(data)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_tied_tensors_share_a_storage(tmp_path):
    weight = torch.ones(4, 2)
    torch.save({"tok_embeddings.weight": weight, "output.weight": weight}, tmp_path / "tied.pth")
    found = inspect_pth(tmp_path / "tied.pth")
    assert found["tok_embeddings.weight"] == found["output.weight"]


def test_the_zip_directory_is_read_as_pythons_zipfile_reads_it(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({f"t{n}": torch.randn(n, 7) for n in range(20)}, path)
    with path.open("rb") as file, zipfile.ZipFile(path) as archive:
        ours = {
            (record.name, record.header_offset, record.size, record.crc) for record in read_directory(file, path.stat().st_size)
        }
        assert ours == {(info.filename, info.header_offset, info.file_size, info.CRC) for info in archive.infolist()}


def test_files_that_keep_no_crc_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(2)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert inspect_pth(tmp_path / "a.pth")["a"].shape == (2,)


@pytest.fixture(scope="module")
def llama_405b(tmp_path_factory, meta_tokenizer_path) -> Path:
    """The complete 16-shard release, with sparse files for the weights."""
    folder = tmp_path_factory.mktemp("405b")
    release = find_release("Llama3.1-405B:bf16-mp16")
    (folder / "params.json").write_text(json.dumps(dict(release.params)))
    (folder / "tokenizer.model").symlink_to(folder / "real.model")
    (folder / "real.model").write_bytes(meta_tokenizer_path.read_bytes())
    model = model_without_memory(ModelArgs.from_dict(release.params))
    shapes = {name: shard_shape(name, tuple(parameter.shape), 16) for name, parameter in model.named_parameters()}
    # Never written, so they take no memory.
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    first = folder / "consolidated.00.pth"
    with torch.serialization.skip_data():
        torch.save(tensors, first)
    weights_at = inspect_pth(first)["tok_embeddings.weight"].file_offset
    for rank in range(1, 16):
        path = folder / f"consolidated.{rank:02d}.pth"
        subprocess.run(["cp", "--sparse=always", first, path], check=True)
        with path.open("r+b") as file:  # otherwise they would be copies of each other
            file.seek(weights_at)
            file.write(bytes([rank]))
    return folder


def test_405b_in_16_shards_is_checked_in_seconds_and_little_memory(llama_405b):
    shard = llama_405b / "consolidated.07.pth"
    assert abs(shard.stat().st_size - 51_268_302_389) < 5_000_000  # Meta's own shard
    with little_memory_and_time(megabytes=80, seconds=60):
        report = verify(llama_405b, quick=True)
    assert not report.bad and report.exit_code == 3 and len(report.files) == 18
    begun = time.process_time()
    os.truncate(shard, 50_000_000_000)
    os.truncate(llama_405b / "consolidated.08.pth", 51_268_302_389 + (3 << 30))
    report = verify(llama_405b, quick=True)
    assert "consolidated.07.pth is 1.27 GB short: the download broke off" in report.summary()
    assert time.process_time() - begun < 15
    assert abs(report.bad[0].expected_size - 51_268_302_389) < 5_000_000
    assert {file.name: file.state for file in report.bad} == {
        "consolidated.07.pth": State.CUT_SHORT,
        "consolidated.08.pth": State.LONGER,
    }


# --- the other files --------------------------------------------------------------------------------------------------

TINY = {
    "dim": 32,
    "n_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 512,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
RANKS = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]


def sparse_gigabyte(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b'{"dim": 32')
        file.truncate(1 << 30)


def params(text: str):
    return "params.json", lambda path: path.write_text(text)


def last_rank(line: bytes):
    return "tokenizer.model", lambda path: path.write_bytes(b"\n".join([*RANKS[:-1], line]))


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


LLAMA2_TOKENIZER = b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02"
OTHERS = {
    "params of 1 GB": (("params.json", sparse_gigabyte), "larger than"),
    "params nested 10^6 deep": (params('{"a":' + "[" * 10**6), "larger than|nested"),
    "params nested 10^5 deep": (params('{"a":' + "[" * 10**5 + "]" * 10**5 + "}"), "nested"),
    "params of 10^30 layers": (params(json.dumps(TINY | {"n_layers": 10**30})), "n_layers"),
    "a tokenizer of 1 GB": (("tokenizer.model", sparse_gigabyte), "larger than"),
    "a rank twice": (last_rank(b"/w== 3"), "rank"),
    "a token twice": (last_rank(b"AA== 255"), "repeats the token"),
    "a negative rank": (last_rank(b"/w== -1"), "rank"),
    "a rank of 10^100": (last_rank(b"/w== 1" + b"0" * 100), "rank"),
    "invalid base64": (last_rank(b"%%%% 255"), "base64"),
    "a Llama 2 tokenizer": (("tokenizer.model", lambda path: path.write_bytes(LLAMA2_TOKENIZER)), "SentencePiece"),
    "a link to itself": (("tokenizer.model", link_to_itself), "leads back to itself|Too many levels"),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "bytes.model").write_bytes(b"".join(line + b"\n" for line in RANKS))
    return make_random_checkpoint(tmp_path / "folder", TINY, tokenizer=tmp_path / "bytes.model")


@pytest.mark.parametrize("attack", OTHERS)
@pytest.mark.parametrize("listed", [True, False])
def test_a_malicious_text_file_is_named_within_bounds(folder, attack, listed):
    (name, make), message = OTHERS[attack]
    make(folder / name)
    if not listed:
        (folder / "checklist.chk").unlink()
    with little_memory_and_time(megabytes=300):
        report = verify(folder, quick=True)
    assert [file.name for file in report.bad] == [name]
    assert re.search(message, report.bad[0].detail)


@pytest.mark.parametrize("change", [{"vocab_size": 512 * 1000}, {"n_layers": 3000}, {"hidden_dim": 64}])
def test_params_that_claim_another_model_contradict_the_weights(folder, change):
    (folder / "params.json").write_text(
        json.dumps({key: TINY[key] for key in TINY if key != "multiple_of"} | {"hidden_dim": 96} | change)
    )
    with little_memory_and_time(seconds=60):
        report = verify(folder, quick=True)
    assert {file.name: file.state for file in report.bad} == {"params.json": State.MISFIT}
    assert "it and consolidated.00.pth contradict each other" in report.summary()


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 2000 + "b", "consolidated.99999999999999999999.pth", "params.json/x"])
def test_malicious_names_do_no_harm(folder, name):
    with (folder / "checklist.chk").open("a") as file:
        file.write(f"{'0' * 32}  {name}\n")
    with little_memory_and_time():
        report = verify(folder)
    assert [file.name for file in report.bad] == [name]
