"""safetensors are read as the library reads them, bad headers are errors, all formats agree."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from attempts import attempts
from bounds import little_memory_and_time
from folders import tiny_folder
from llama_ref.checkpoint.describe import describe
from llama_ref.checkpoint.diff import compare
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.formats.safetensors import map_safetensors
from llama_ref.checkpoint.hf.names import from_hf_rope, hf_name, to_hf_rope
from llama_ref.checkpoint.integrity import verify
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.checkpoint.reader import Stored, TensorSlice, is_tied, open_stored
from llama_ref.checkpoint.shapes import OUTPUT, expected_shapes
from llama_ref.checkpoint.writing.convert import to_hugging_face, to_meta
from llama_ref.errors import CheckpointError
from llama_ref.parallel.sharding import split_dim
from llama_ref.plan import find_model

pytestmark = pytest.mark.usefixtures("settled")

WQ = "layers.0.attention.wq.weight"
F32_PAIR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]
DTYPES += [torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]


def file_of(header: object, data: bytes = bytes(8)) -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        and torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        for name, tensor in expected.items()
    )


# ---- safetensors, mapped


def test_every_dtype_and_shape_is_read_as_the_library_reads_it(tmp_path):
    tensors = {str(dtype): (9 * torch.randn(5, 7)).to(dtype) for dtype in DTYPES}
    tensors |= {"없음": torch.zeros(0, 3), "one": torch.tensor(1.5), "a\0b": torch.ones(1, 1, 1, 2)}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", "more": "words"})
    assert same(map_safetensors(tmp_path / "a.safetensors"), tensors)


@pytest.mark.parametrize(
    ("header", "n_bytes"),
    [
        # Of odd length, so that floats are misaligned.
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]} }', 8),
        ({"b": F32_PAIR | {"data_offsets": [8, 16]}, "a": F32_PAIR}, 16),
        ({"a": F32_PAIR, "z": F32_PAIR | {"shape": [0], "data_offsets": [8, 8]}}, 8),
        ({}, 0),
    ],
)
def test_a_header_is_read_as_the_library_reads_it(tmp_path, header, n_bytes):
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_of(header, bytes(range(n_bytes))))
    assert same(map_safetensors(path), load_file(path))


BROKEN = {
    "overlapping": file_of({"a": F32_PAIR, "b": F32_PAIR}),
    "overlapping by half": file_of({"a": F32_PAIR, "b": F32_PAIR | {"data_offsets": [4, 12]}}, bytes(12)),
    "a gap": file_of({"a": F32_PAIR, "b": F32_PAIR | {"data_offsets": [16, 24]}}, bytes(24)),
    "a negative place": file_of({"a": F32_PAIR | {"data_offsets": [-8, 0]}}),
    "backwards": file_of({"a": F32_PAIR | {"data_offsets": [8, 0]}}),
    "three places": file_of({"a": F32_PAIR | {"data_offsets": [0, 8, 16]}}),
    "a place beyond 63 bits": file_of({"a": F32_PAIR | {"data_offsets": [0, 1 << 63]}}),
    "a place beyond 64 bits": file_of({"a": F32_PAIR | {"data_offsets": [0, 1 << 70]}}),
    "more bytes than there are": file_of({"a": F32_PAIR}, bytes(4)),
    "bytes too many": file_of({"a": F32_PAIR}, bytes(80)),
    "another shape": file_of({"a": F32_PAIR | {"shape": [3]}}),
    "an enormous shape": file_of({"a": F32_PAIR | {"shape": [1 << 40, 1 << 40]}}),
    "a shape that wraps to the right size": file_of({"a": F32_PAIR | {"shape": [1 << 63, 2, 2]}}),
    "nothing, but too wide to count": file_of({"a": F32_PAIR | {"shape": [0, 1 << 63], "data_offsets": [0, 0]}}, b""),
    "nothing, with strides too wide": file_of({"a": F32_PAIR | {"shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}}, b""),
    "too many dimensions to multiply": file_of({"a": F32_PAIR | {"shape": [1 << 59] * 40_000}}),
    "dimensions of one": file_of({"a": F32_PAIR | {"shape": [1] * 100 + [2]}}),
    "an endless name": file_of({"a" * 100_000: F32_PAIR | {"shape": [3]}}),
    "a shape of fractions": file_of({"a": F32_PAIR | {"shape": [2.0]}}),
    "a negative shape": file_of({"a": F32_PAIR | {"shape": [-2]}}),
    "a key too many": file_of({"a": F32_PAIR | {"self": 1}}),
    "a key too few": file_of({"a": {"dtype": "F32", "shape": [2]}}),
    "a list for an entry": file_of({"a": [1]}),
    "an unknown dtype": file_of({"a": F32_PAIR | {"dtype": "F31"}}),
    "two numbers in a byte": file_of({"a": F32_PAIR | {"dtype": "F4", "shape": [16]}}),
    "one name twice": file_of(
        b'{"a":%b,"a":%b}' % tuple(json.dumps(F32_PAIR | {"dtype": dtype}).encode() for dtype in ("F32", "I32"))
    ),
    "one key twice": file_of(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"dtype":"I32"}}'),
    "metadata of numbers": file_of({"__metadata__": {"format": 1}, "a": F32_PAIR}),
    "an endless header": b"\xff" * 8 + b"{}",
    "a header longer than the file": (90_000_000).to_bytes(8, "little") + b"{}",
    "a deep header": file_of(b'{"a":' * 100_000),
    "a list": file_of([1], b""),
    "null": file_of(b"null", b""),
    "NaN": file_of(b'{"a":NaN}', b""),
    "no UTF-8": file_of(b'{"\xff":{}}', b""),
    "half a character": file_of(b'{"\\ud800":%b}' % json.dumps(F32_PAIR).encode()),
    "seven bytes": b"1234567",
    "no bytes": b"",
    "zeros": bytes(1000),
    "a pickle": b"\x80\x02}q\x00." * 10,
    "a web page": b"<!DOCTYPE html><html>",
    "a pointer": b"version https://git-lfs.github.com/spec/v1",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_an_error_that_names_it_and_costs_nothing(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BROKEN[name])
    with little_memory_and_time(megabytes=20, seconds=5), pytest.raises(CheckpointError) as error:
        map_safetensors(path)
    assert str(path) in str(error.value) and len(str(error.value)) < 500


def test_what_is_no_file_is_an_error(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("folder.safetensors", "nothing.safetensors"):
        with pytest.raises(CheckpointError, match=name):
            map_safetensors(tmp_path / name)


@pytest.mark.attack
@given(data=st.data())
@settings(max_examples=attempts(200))
def test_damage_is_an_error_or_what_the_library_reads(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    whole = bytearray(
        file_of({"a": F32_PAIR, "b": F32_PAIR | {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]}}, bytes(16))
    )
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789{}[],"'))
    path.write_bytes(whole)
    try:
        tensors = map_safetensors(path)
    except CheckpointError:
        return
    try:
        assert same(tensors, load_file(path))
    except SafetensorError as error:
        raise AssertionError("read here, refused by the library") from error


def test_changing_a_mapped_tensor_does_not_change_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    before = path.read_bytes()
    map_safetensors(path)["a"].zero_()
    assert path.read_bytes() == before


# ---- a folder's tensors in any format


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """One model in every format and number of files."""
    shards = {f"{n} shards": tiny_folder(tmp_path / str(n), shards=n, dtype=torch.float32) for n in (1, 2, 4)}
    source = shards["1 shards"]
    cut = {"one file": {}, "several files": {"max_shard_bytes": 20_000}}
    return shards | {name: to_hugging_face(source, tmp_path / name, **options) for name, options in cut.items()}


def stored_in(folder: Path) -> Stored:
    opened = open_folder(folder)
    return open_stored(opened, opened.read_args())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("columns", [slice(None), slice(1024, 3072)], ids=["rows", "cut columns"])
def test_a_copied_matrix_leaves_no_pages_of_its_file_in_memory(tmp_path, columns):
    save_file({"w": torch.ones(8192, 4096, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")  # 64 MB
    mapped = map_safetensors(tmp_path / "a.safetensors")["w"]
    target = torch.zeros_like(mapped[:, columns], memory_format=torch.contiguous_format)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current size
    TensorSlice(mapped[:, columns], mapped).copy_to(target)
    assert status("VmHWM") - before < 24 << 20
    assert torch.equal(target, mapped[:, columns])


def status(name: str) -> int:
    """Bytes of this process's memory, from the kernel's status field of this name."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def test_every_form_gives_the_same_slices(folders):
    whole = torch.load(folders["1 shards"] / "consolidated.00.pth", weights_only=True)
    args = open_folder(folders["1 shards"]).read_args()
    for form, folder in folders.items():
        stored = stored_in(folder)
        assert not stored.tied
        for name in expected_shapes(args):
            dim = split_dim(name)
            slices = stored.slices(name)
            assert torch.equal(torch.cat([each.tensor for each in slices], dim or 0), whole[name]), (form, name)
            assert stored.dtype(name) == torch.float32
            if dim is not None:  # two ranges of whole heads, the later one first
                wanted = [range(16, 32), range(8)]
                parts = [each.tensor for each in stored.slices(name, wanted)]
                expected = [whole[name].narrow(dim, each.start, len(each)) for each in wanted]
                assert torch.equal(torch.cat(parts, dim), torch.cat(expected, dim)), (form, name)
            for each in slices:
                each.release()
            assert torch.equal(torch.cat([each.tensor for each in stored.slices(name)], dim or 0), whole[name])


def tied_folder_with(tmp_path: Path, output: Callable[[Tensor], Tensor]) -> Path:
    """A folder whose config.json ties the output, with `output(embedding)` as lm_head.weight."""
    folder = to_hugging_face(tiny_folder(tmp_path / "tied", tied=True), tmp_path / "hf")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    assert hf_name(OUTPUT) not in tensors
    save_file(tensors | {hf_name(OUTPUT): output(tensors["model.embed_tokens.weight"])}, path, {"format": "pt"})
    (folder / "checklist.chk").unlink()
    return folder


def test_a_copy_of_the_embedding_is_a_tied_output(tmp_path, caplog):
    folder = tied_folder_with(tmp_path, Tensor.clone)
    assert stored_in(folder).tied and is_tied(open_folder(folder))
    assert not caplog.records


@pytest.mark.parametrize("change", [lambda x: -x, lambda x: x.float() + 1], ids=["other values", "other dtype"])
def test_a_tied_model_with_an_output_of_its_own_uses_it_in_every_command(tmp_path, caplog, change):
    folder = tied_folder_with(tmp_path, change)
    own = load_file(folder / "model.safetensors")[hf_name(OUTPUT)]
    untied = tmp_path / "untied"
    shutil.copytree(folder, untied)
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))

    assert torch.equal(load_model(open_folder(folder), open_folder(folder).read_args()).output.weight, own.bfloat16())
    assert "tie_word_embeddings, but the files hold another lm_head.weight, which is used" in caplog.text
    assert not describe(open_folder(folder)).tied_output and not find_model(str(folder)).tied
    assert compare(folder, untied).identical
    assert not verify(folder, quick=True).bad
    native = to_meta(folder, tmp_path / "native")
    assert not is_tied(open_folder(native)) and compare(native, untied).identical
    again = to_hugging_face(folder, tmp_path / "again")
    assert json.loads((again / "config.json").read_text()) == config | {"tie_word_embeddings": False}


def test_an_output_of_a_tied_model_that_does_not_fit_is_an_error(tmp_path):
    folder = tied_folder_with(tmp_path, lambda x: x[:-1].clone())
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \(511, 32\), expected \(512, 32\)"):
        stored_in(folder)
    (bad,) = verify(folder, quick=True).bad
    assert "lm_head.weight has shape (511, 32)" in bad.detail


def test_an_output_that_is_not_tied_has_to_be_there(folders):
    path = folders["one file"] / "model.safetensors"
    tensors = load_file(path)
    del tensors[hf_name(OUTPUT)]
    save_file(tensors, path, {"format": "pt"})
    says = r'lm_head\.weight is missing, expected shape \(512, 32\); if the output is the embedding, set "tie_word_embeddings"'
    with pytest.raises(CheckpointError, match=says):
        stored_in(folders["one file"])
    assert re.search(says, verify(folders["one file"], quick=True).summary())


def test_a_tensor_in_two_files_is_an_error_that_names_both(folders):
    first, second, *_ = sorted(folders["several files"].glob("*.safetensors"))
    tensors = load_file(first)
    save_file(load_file(second) | tensors, second, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{first.name} and {second.name} both hold {next(iter(tensors))}"):
        stored_in(folders["several files"])


@given(n_heads=st.integers(1, 5), half=st.integers(1, 8), width=st.integers(1, 4))
def test_the_order_of_rows_there_and_back(n_heads, half, width):
    rows = torch.arange(n_heads * 2 * half * width).view(-1, width)
    turned = to_hf_rope(WQ, rows, 2 * half)
    assert torch.equal(from_hf_rope(WQ, turned, 2 * half), rows)
    for i in range(half):  # pairs that RoPE rotates: neighbours, or halves
        assert torch.equal(turned[i], rows[2 * i]) and torch.equal(turned[i + half], rows[2 * i + 1])
    unturned = "layers.0.attention.wv.weight"
    assert to_hf_rope(unturned, rows, 2 * half) is rows and from_hf_rope(unturned, rows, 2 * half) is rows
