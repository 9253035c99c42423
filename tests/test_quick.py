"""The look without reading weights: agrees with torch on good files, and survives files made to attack."""

import base64
import collections
import io
import json
import os
import pickle
import re
import struct
import time
import tracemalloc
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.archive_length import archive_length
from llama_ref.checkpoint.inspect_pth import inspect_pth
from llama_ref.checkpoint.integrity import verify
from llama_ref.checkpoint.report import State
from llama_ref.checkpoint.structure import shard_shape
from llama_ref.checkpoint.tensor_pickle import INSTRUCTION_LIMIT, ITEM_BYTES, RefusedPickle, read_tensor_pickle
from llama_ref.checkpoint.zip_directory import CENTRAL, CENTRAL_SIGNATURE, END, END_SIGNATURE, read_directory, read_end
from llama_ref.errors import CheckpointError
from llama_ref.model import Transformer
from llama_ref.releases import find_release
from make_random_checkpoint import make_random_checkpoint

DTYPES = [getattr(torch, name) for name in ITEM_BYTES]


@contextmanager
def little_memory_and_time(megabytes: int = 100, seconds: float = 20):
    """Python's own allocations stay below `megabytes`; tracing them slows the block several times, hence the long limit."""
    begun = time.monotonic()
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < megabytes << 20, f"{peak >> 20} MB"
    assert time.monotonic() - begun < seconds


# --- good files -------------------------------------------------------------------------------------------------------


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
def test_tensors_are_seen_as_torch_loads_them(tmp_path_factory, tensors):
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
    """The 16-shard release, every byte in its place, the weights a hole in the file."""
    folder = tmp_path_factory.mktemp("405b")
    release = find_release("Llama3.1-405B:bf16-mp16")
    (folder / "params.json").write_text(json.dumps(dict(release.params)))
    (folder / "tokenizer.model").symlink_to(folder / "real.model")
    (folder / "real.model").write_bytes(meta_tokenizer_path.read_bytes())
    with torch.device("meta"):
        model = Transformer(ModelArgs.from_dict(release.params))
    shapes = {name: shard_shape(name, tuple(parameter.shape), 16) for name, parameter in model.named_parameters()}
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}  # never touched: no memory
    for rank in range(16):
        with torch.serialization.skip_data():
            torch.save(tensors, folder / f"consolidated.{rank:02d}.pth")
    return folder


def test_405b_in_16_shards_is_looked_at_in_seconds_and_little_memory(llama_405b):
    shard = llama_405b / "consolidated.07.pth"
    assert abs(shard.stat().st_size - 51_268_302_389) < 5_000_000  # Meta's own shard
    with little_memory_and_time(megabytes=80, seconds=60):
        report = verify(llama_405b, quick=True)
    assert report.ok and len(report.files) == 18
    begun = time.monotonic()
    os.truncate(shard, 50_000_000_000)
    report = verify(llama_405b, quick=True)
    assert "consolidated.07.pth is 1.27 GB short: the download broke off" in report.summary()
    assert time.monotonic() - begun < 15
    assert abs(report.bad[0].expected_size - 51_268_302_389) < 5_000_000
    with (llama_405b / "consolidated.08.pth").open("r+b") as file:
        file.truncate(51_268_302_389 + (3 << 30))
    assert {file.name: file.state for file in verify(llama_405b, quick=True).bad} == {
        "consolidated.07.pth": State.CUT_SHORT,
        "consolidated.08.pth": State.LONGER,
    }


@pytest.mark.parametrize(
    "extra, note",
    [
        ({"quantization_args": {"scheme": "int4_weight_int8_dynamic_activation", "group_size": 32}}, "an int4 release"),
        ({"vision_chunk_size": 560, "vision_max_num_chunks": 4, "vision_num_cross_attention_layers": 8}, "a vision release"),
    ],
)
def test_releases_with_other_tensors_are_not_called_misfits(tmp_path, extra, note):
    torch.save({"text_model.something": torch.ones(2)}, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(dict(find_release("Llama3.2-1B").params) | extra))
    (tmp_path / "tokenizer.model").write_bytes(b"")
    report = verify(tmp_path, quick=True)
    assert [file.name for file in report.bad] == ["tokenizer.model"] and note in report.notes[0]


# --- pickles made to attack -------------------------------------------------------------------------------------------


class Storage:
    """What the pickle will refer to as a storage of `numel` elements."""

    def __init__(self, numel, kind=torch.FloatStorage, key="0"):
        self.identity = ("storage", kind, key, "cpu", numel)


class Tensor:
    """A tensor in the pickle with whatever numbers are claimed."""

    def __init__(self, shape, stride, offset=0, storage=None):
        self.arguments = (storage or Storage(16), offset, shape, stride, False, collections.OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


class Call:
    """An object whose unpickling calls `function`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def pickled(value, protocol: int = 2) -> bytes:
    out = io.BytesIO()
    pickler = pickle.Pickler(out, protocol)
    pickler.persistent_id = lambda item: item.identity if isinstance(item, Storage) else None
    pickler.dump(value)
    return out.getvalue()


def write_pth(path: Path, data: bytes, storages: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, content in (storages if storages is not None else {"0": bytes(64)}).items():
            archive.writestr(f"archive/data/{key}", content)
    return path


def harmless_until_run(path: Path) -> Call:
    return Call(os.system, f"touch {path}")


OK = Tensor((4, 4), (4, 1))
NESTED = b"\x80\x02)" + b"\x85" * (300_000) + b"."
PICKLES = {
    "10^15 elements": (Tensor((10**15,), (1,)), "reads past its storage of 16 elements"),
    "10^15 elements in a storage that claims them": (Tensor((10**15,), (1,), 0, Storage(10**15)), "claims a storage of 4,000,"),
    "10^15 elements by a stride of 0": (Tensor((10**15,), (0,)), "reads past its storage"),
    "an offset past the end": (Tensor((4, 4), (4, 1), 1), "reads past its storage"),
    "a stride past the end": (Tensor((4, 4), (5, 1)), "reads past its storage"),
    "a negative offset": (Tensor((2,), (1,), -1), "is no count"),
    "a negative stride": (Tensor((2,), (-1,)), "is no count"),
    "a size that is a float": (Tensor((2.0,), (1,)), "is no count"),
    "a size that is true": (Tensor((True,), (1,)), "is no count"),
    "a size of 500 digits": (Tensor((10**500,), (1,)), "is no count"),
    "50,000 dimensions": (Tensor((1,) * 50_000, (1,) * 50_000), "50000 sizes"),
    "more sizes than strides": (Tensor((2, 2), (1,)), "2 sizes and 1 strides"),
    "a storage that is not there": (Tensor((1,), (1,), 0, Storage(16, key="1")), "storage '1', which the archive lacks"),
    "a storage above the folder": (Tensor((1,), (1,), 0, Storage(16, key="../../x")), "which the archive lacks"),
    "another dtype than its storage": (
        Tensor((1,), (1,), 0, Storage(16, torch.DoubleStorage)),
        "claims a storage of 128 bytes",
    ),
    "complex": (Tensor((1,), (1,), 0, Storage(16, torch.ComplexFloatStorage)), "complex tensors"),
    "quantized storage": (Tensor((1,), (1,), 0, Storage(16, torch.QInt8Storage)), "quantized tensors"),
    "sparse": (torch.eye(3).to_sparse(), "sparse tensors"),
    "a number": (3, "entry 'w' is a value of type int"),
    "a dictionary": ({"w": OK}, "save that inner dictionary"),
    "a numpy array": (numpy.ones(3), "asks Python to use 'numpy"),
    "a call of eval": (Call(eval, "1"), "asks Python to use .*eval"),
    "a call of getattr": (Call(getattr, "x", "y"), "asks Python to use .*getattr"),
    "a call of what torch offers": (Call(torch.hub.load, "y"), "asks Python to use 'torch.hub"),
    "a text of a megabyte": ("x" * (1 << 20), "a text of 1,048,576 bytes"),
}


@pytest.mark.parametrize("attack", PICKLES)
def test_a_tensor_that_claims_too_much_is_refused(tmp_path, attack):
    value, message = PICKLES[attack]
    path = write_pth(tmp_path / "attack.pth", pickled({"w": value}))
    with little_memory_and_time(), pytest.raises(CheckpointError, match=message) as caught:
        inspect_pth(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 700


RAW = {
    "a key twice": (b"\x80\x02}(X\1\0\0\0aNX\1\0\0\0aNu.", "the key 'a' twice"),
    "a number as key": (b"\x80\x02}(K\1Nu.", "of type int as a key"),
    "a nested tuple as key": (NESTED[:-1] + b"0.", "0x30|of type tuple"),
    "a tuple in a tuple, again and again": (NESTED, "holds a value of type tuple"),
    "marks without end": (b"\x80\x02" + b"(" * (2 * INSTRUCTION_LIMIT), "beyond 1,000,000 instructions"),
    "dictionaries without end": (b"\x80\x02" + b"}" * (2 * INSTRUCTION_LIMIT), "beyond 1,000,000 instructions"),
    "a text of 4 GB": (b"\x80\x02X\xff\xff\xff\xff", "a text of 4,294,967,295 bytes"),
    "a byte array of 2^60 bytes": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 60), "instruction 0x96"),
    "a number of 2^31 bytes": (b"\x80\x02\x8b\xff\xff\xff\x7f", "instruction 0x8b"),
    "a memo of 2^32 places": (b"\x80\x02}r\xff\xff\xff\xff.", None),
    "a value never stored": (b"\x80\x02h\7.", "never stored"),
    "the protocol of 1995": (pickle.dumps({"a": 1}, 0), "instruction"),
    "no end": (b"\x80\x02}", "breaks off"),
    "nothing": (b"", "breaks off"),
    "attributes of a tuple": (b"\x80\x02)}b.", "sets attributes"),
    "a persistent id that is no storage": (b"\x80\x02K\1Q.", "no tensor storage"),
}


@pytest.mark.parametrize("attack", RAW)
def test_a_pickle_that_is_no_dictionary_of_tensors_is_refused(tmp_path, attack):
    data, message = RAW[attack]
    path = write_pth(tmp_path / "attack.pth", data)
    with little_memory_and_time(megabytes=200):
        if message is None:
            assert inspect_pth(path) == {}
        else:
            with pytest.raises(CheckpointError, match=message):
                inspect_pth(path)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("options", [{"quick": True}, {}, {"deep": True}], ids=["quick", "full", "deep"])
def test_nothing_in_a_pickle_is_run(tmp_path, protocol, options):
    witness = tmp_path / "witness"
    write_pth(tmp_path / "consolidated.00.pth", pickled({"norm.weight": harmless_until_run(witness)}, protocol))
    report = verify(tmp_path, **options)
    assert not witness.exists()
    shard = next(file for file in report.bad if file.name == "consolidated.00.pth")
    assert shard.state is State.REFUSED and "do not load it" in shard.sentence()
    pickle.loads(pickled(harmless_until_run(witness)))
    assert witness.exists(), "the pickle does run where it is trusted"


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_garbled_pickle_does_more_than_be_refused(data):
    good = pickled({"a": OK, "b": Tensor((2,), (1,), 3)})
    garbled = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        garbled[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        found, _ = read_tensor_pickle(bytes(garbled))
    except RefusedPickle:
        return
    assert all(type(size) is int and 0 <= size < 1 << 62 for tensor in found.values() for size in tensor.shape)


# --- archives made to attack ------------------------------------------------------------------------------------------

GOOD_PICKLE = pickled({"w": OK})
BOMB = bytes(50 << 20)


WHERE = {"flags": (8, "<H"), "crc": (16, "<L"), "packed": (20, "<L"), "size": (24, "<L"), "offset": (42, "<L")}


def edited(name: str, **fields: int):
    """A maker of a good archive in which fields of one record's entry in the zip directory are overwritten."""

    def make(path: Path) -> None:
        data = bytearray(write_pth(path, GOOD_PICKLE, {"0": bytes(64), "1": b""}).read_bytes())
        at = data.rindex(f"archive/{name}".encode()) - CENTRAL.size
        assert data[at : at + 4] == CENTRAL_SIGNATURE
        for field, value in fields.items():
            offset, layout = WHERE[field]
            struct.pack_into(layout, data, at + offset, value)
        path.write_bytes(data)

    return make


def with_end(n_records: int, directory_size: int, directory_offset: int, hole: int = 0):
    """A maker of a good archive, then a hole in the file, then an end record that says what is given."""

    def make(path: Path) -> None:
        with write_pth(path, GOOD_PICKLE).open("r+b") as file:
            file.seek(hole - END.size, os.SEEK_END)
            file.write(END.pack(END_SIGNATURE, 0, 0, n_records, n_records, directory_size, directory_offset, 0))

    return make


def with_another(name: str):
    def make(path: Path) -> None:
        with zipfile.ZipFile(write_pth(path, GOOD_PICKLE), "a") as archive:
            archive.writestr(zipfile.ZipInfo(name), GOOD_PICKLE)

    return make


def empty_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")


def with_comment(path: Path) -> None:
    with zipfile.ZipFile(write_pth(path, GOOD_PICKLE), "a") as archive:
        archive.comment = b"more"


def big_endian(path: Path) -> None:
    with zipfile.ZipFile(write_pth(path, GOOD_PICKLE), "a") as archive:
        archive.writestr("archive/byteorder", "big")


def without_zip(path: Path) -> None:
    torch.save({"w": torch.ones(1)}, path, _use_new_zipfile_serialization=False)


GB = 1 << 30
ARCHIVES = {
    "a compressed bomb as pickle": (lambda path: write_pth(path, BOMB, {}, zipfile.ZIP_DEFLATED), "is compressed"),
    "a compressed bomb as storage": (lambda path: write_pth(path, GOOD_PICKLE, {"0": BOMB}, zipfile.ZIP_LZMA), "is compressed"),
    "a pickle of 50 MB": (lambda path: write_pth(path, BOMB), "far more than a dictionary of tensors needs"),
    "a size past the end": (edited("data/0", size=2 * GB, packed=2 * GB), "more than the file has"),
    "a packed size of its own": (edited("data/0", packed=8), "is compressed"),
    "an offset past the end": (edited("data/0", offset=2 * GB), "does not begin where"),
    "a 64-bit offset left out": (edited("data/0", offset=0xFFFFFFFF), "lacks the 64-bit size"),
    "a record on top of another": (edited("data/1", offset=60), "overlaps another"),
    "two records with one place": (edited("data/0", offset=0), "overlaps another|does not begin where"),
    "an encrypted record": (edited("data/0", flags=1), "is encrypted"),
    "a wrong CRC of the pickle": (edited("data.pkl", crc=7), "own CRC-32"),
    "a directory of 4 GB": (with_end(2, 0xFFFFFFF0, 0), "does not end where"),
    "a directory of 3 GB that is there": (with_end(2, 3 * GB, 0, hole=3 * GB), "does not end where|more than any"),
    "a directory beyond the limit": (with_end(2, GB, 0, hole=GB), "does not end where|more than any"),
    "more records than listed": (
        lambda path: with_end(3, *directory_of(write_pth(path, GOOD_PICKLE)))(path),
        "3 are announced",
    ),
    "two pickles": (with_another("other/data.pkl"), "2 records named data.pkl"),
    "one name twice": (with_another("archive/data/0"), "names a record twice"),
    "no pickle": (empty_zip, "0 records named data.pkl"),
    "a comment behind the directory": (with_comment, "is not at the end of the file"),
    "big-endian numbers": (big_endian, "big-endian"),
    "an old torch file": (without_zip, "before 1.6"),
    "safetensors": (lambda path: path.write_bytes(struct.pack("<Q", 2) + b"{}"), "is a safetensors file"),
    "anything": (lambda path: path.write_bytes(b"some text"), "is no .pth"),
}


def directory_of(path: Path) -> tuple[int, int]:
    with path.open("rb") as file:
        end = read_end(file, path.stat().st_size)
    return end.directory_size, end.directory_offset


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("attack", ARCHIVES)
def test_an_archive_that_torch_would_not_write_is_refused(tmp_path, attack):
    make, message = ARCHIVES[attack]
    path = tmp_path / "attack.pth"
    make(path)
    with little_memory_and_time(), pytest.raises(CheckpointError, match=message):
        inspect_pth(path)


def test_a_zip_within_the_zip_is_only_bytes(tmp_path):
    inner = write_pth(tmp_path / "inner.zip", BOMB, {}, zipfile.ZIP_DEFLATED).read_bytes()
    inner += bytes(-len(inner) % 4)
    claimed = Tensor((1,), (1,), 0, Storage(len(inner) // 4))
    path = write_pth(tmp_path / "outer.pth", pickled({"w": claimed}), {"0": inner})
    with little_memory_and_time(megabytes=5):
        assert inspect_pth(path)["w"].storage_nbytes == len(inner)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_garbled_archive_does_more_than_be_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "garbled.pth"
    garbled = bytearray(write_pth(path, GOOD_PICKLE).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        garbled[data.draw(st.integers(0, len(garbled) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(garbled[: data.draw(st.integers(1, len(garbled)))])
    archive_length(path)
    try:
        inspect_pth(path)
    except CheckpointError as error:
        assert str(path) in str(error)


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
        file.truncate(GB)


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
def test_a_text_file_made_to_attack_is_named_within_bounds(folder, attack, listed):
    (name, make), message = OTHERS[attack]
    make(folder / name)
    if not listed:
        (folder / "checklist.chk").unlink()
    with little_memory_and_time(megabytes=300):
        report = verify(folder, quick=True)
    assert [file.name for file in report.bad] == [name]
    assert re.search(message, report.bad[0].detail)


@pytest.mark.parametrize("change", [{"vocab_size": 512 * 1000}, {"n_layers": 9999}, {"hidden_dim": 64}])
def test_params_that_claim_another_model_do_not_fit_the_weights(folder, change):
    (folder / "params.json").write_text(
        json.dumps({key: TINY[key] for key in TINY if key != "multiple_of"} | {"hidden_dim": 96} | change)
    )
    with little_memory_and_time(seconds=60):
        report = verify(folder, quick=True)
    assert {file.name: file.state for file in report.bad}["consolidated.00.pth"] is State.MISFIT


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000 + "b", "consolidated.99999999999999999999.pth", "params.json/x"])
def test_names_made_to_attack_harm_nothing(folder, name):
    with (folder / "checklist.chk").open("a") as file:
        file.write(f"{'0' * 32}  {name}\n")
    with little_memory_and_time():
        report = verify(folder)
    assert [file.name for file in report.bad] == [name]
