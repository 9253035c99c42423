"""Malicious files are refused with a clear error, in little time and memory, and run no code."""

import collections
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attempts import attempts
from bounds import little_memory_and_time
from llama_ref.checkpoint.formats.pth import inspect_pth
from llama_ref.checkpoint.formats.pth_length import archive_length
from llama_ref.checkpoint.formats.pth_pickle import INSTRUCTION_LIMIT, RefusedPickle, read_tensor_pickle
from llama_ref.checkpoint.formats.pth_zip import (
    CENTRAL,
    CENTRAL_SIGNATURE,
    END,
    END_SIGNATURE,
    IN_ZIP64,
    LOCAL,
    LOCAL_SIGNATURE,
    LOCATOR64,
    LOCATOR64_SIGNATURE,
    ZIP64_EXTRA,
    read_end,
)
from llama_ref.checkpoint.integrity import verify
from llama_ref.checkpoint.verify.report import State
from llama_ref.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("settled")

# --- malicious pickles ------------------------------------------------------------------------------------------------


class Storage:
    """An object that the pickle refers to as a storage of `numel` elements."""

    def __init__(self, numel, kind=torch.FloatStorage, key="0"):
        self.identity = ("storage", kind, key, "cpu", numel)


class Tensor:
    """A tensor in the pickle with any claimed numbers."""

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


class Pickler(pickle.Pickler):
    def persistent_id(self, item):
        return item.identity if isinstance(item, Storage) else None


def pickled(value, protocol: int = 2) -> bytes:
    out = io.BytesIO()
    Pickler(out, protocol).dump(value)
    return out.getvalue()


def write_pth(path: Path, data: bytes, storages: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, content in (storages if storages is not None else {"0": bytes(64)}).items():
            archive.writestr(f"archive/data/{key}", content)
    return path


def harmless_until_run(path: Path) -> Call:
    return Call(os.system, f"touch {path}")


def Rebuilt(*arguments) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, *arguments)


OK = Tensor((4, 4), (4, 1))
TWO_DTYPES = {
    "a": Tensor((4,), (1,), 0, Storage(16)),
    "b": Tensor((4,), (1,), 0, Storage(16, torch.IntStorage)),
}
NESTED = b"\x80\x02)" + b"\x85" * (60_000) + b"."
PICKLES = {
    "10^15 elements": (Tensor((10**15,), (1,)), "reads past its storage of 16 elements"),
    "10^15 elements in a storage that claims them": (Tensor((10**15,), (1,), 0, Storage(10**15)), "claims a storage of 4,000,"),
    "10^15 elements by a stride of 0": (Tensor((10**15,), (0,)), "reads past its storage"),
    "an offset past the end": (Tensor((4, 4), (4, 1), 1), "reads past its storage"),
    "a stride past the end": (Tensor((4, 4), (5, 1)), "reads past its storage"),
    "a negative offset": (Tensor((2,), (1,), -1), "is not a count"),
    "a negative stride": (Tensor((2,), (-1,)), "is not a count"),
    "a size that is a float": (Tensor((2.0,), (1,)), "is not a count"),
    "a size that is true": (Tensor((True,), (1,)), "is not a count"),
    "a size of 500 digits": (Tensor((10**500,), (1,)), "is not a count"),
    "50,000 dimensions": (Tensor((1,) * 50_000, (1,) * 50_000), "50000 sizes"),
    "more sizes than strides": (Tensor((2, 2), (1,)), "2 sizes and 1 strides"),
    "a storage that is not there": (
        Tensor((1,), (1,), 0, Storage(16, key="1")),
        "storage '1', which is missing from the archive",
    ),
    "a storage above the folder": (Tensor((1,), (1,), 0, Storage(16, key="../../x")), "which is missing from the archive"),
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
    "numbers to be negated": (Rebuilt(Storage(16), 0, (4,), (1,), False, {}, {"neg": True}), "does not rebuild a tensor"),
    "hooks": (Rebuilt(Storage(16), 0, (4,), (1,), False, {"x": 1}), "does not rebuild a tensor"),
    "an argument too many": (Rebuilt(Storage(16), 0, (4,), (1,), False, {}, None, 1), "does not rebuild a tensor"),
    "an argument too few": (Rebuilt(Storage(16), 0, (4,), (1,), False), "does not rebuild a tensor"),
    "a gradient that is a number": (Rebuilt(Storage(16), 0, (4,), (1,), 1, {}), "does not rebuild a tensor"),
    "a parameter with hooks": (Call(torch._utils._rebuild_parameter, OK, True, {"x": 1}), "does not rebuild a tensor"),
    "a tensor of a dtype in words": (
        Call(torch._utils._rebuild_tensor_v3, Storage(16), 0, (4,), (1,), False, {}, "float32"),
        "does not rebuild a tensor",
    ),
}


@pytest.mark.parametrize("attack", PICKLES)
def test_a_tensor_that_claims_too_much_is_refused(tmp_path, attack):
    value, message = PICKLES[attack]
    path = write_pth(tmp_path / "attack.pth", pickled({"w": value}))
    with little_memory_and_time(), pytest.raises(CheckpointError, match=message) as caught:
        inspect_pth(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 700


RAW = {
    "a key twice": (b"\x80\x02}(X\1\0\0\0aNX\1\0\0\0aNu.", "duplicate key 'a'"),
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
    "no end": (b"\x80\x02}", "truncated"),
    "nothing": (b"", "truncated"),
    "attributes of a tuple": (b"\x80\x02)}b.", "sets attributes"),
    "a persistent id that is no storage": (b"\x80\x02K\1Q.", "not a tensor storage"),
    "a storage of two dtypes": (pickled(TWO_DTYPES), "describes storage '0' in two ways"),
    "a storage of two sizes": (
        pickled({"a": OK, "b": Tensor((1,), (1,), 0, Storage(15))}),
        "describes storage '0' in two ways",
    ),
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


@pytest.mark.attack
@settings(max_examples=attempts(300), deadline=None)
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


# --- malicious archives -----------------------------------------------------------------------------------------------

GOOD_PICKLE = pickled({"w": OK})
BOMB = bytes(50 << 20)


WHERE = {
    "flags": (8, "<H"),
    "attributes": (38, "<L"),
    "crc": (16, "<L"),
    "packed": (20, "<L"),
    "size": (24, "<L"),
    "offset": (42, "<L"),
}


def edited(name: str, **fields: int):
    """A function that makes a good archive and overwrites fields of a record's directory entry."""

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
    """A function that makes a good archive, then a hole and an end record with these numbers."""

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


def two_end_records(path: Path) -> None:
    """A file of torch.save whose 64-bit locator does not point to the end record before it."""
    torch.save({"w": torch.ones(4)}, path)
    data = bytearray(path.read_bytes())
    at = len(data) - END.size - LOCATOR64.size
    assert data[at : at + 4] == LOCATOR64_SIGNATURE
    LOCATOR64.pack_into(data, at, LOCATOR64_SIGNATURE, 0, 0, 1)
    path.write_bytes(data)


def far_record(path: Path) -> None:
    """An archive that claims an offset of a storage beyond the largest possible file."""
    with zipfile.ZipFile(write_pth(path, GOOD_PICKLE, {}), "a") as archive:
        storage = zipfile.ZipInfo("archive/data/0")
        storage.extra = struct.pack("<2HQ", ZIP64_EXTRA, 8, 1 << 63)
        archive.writestr(storage, bytes(64))
    data = bytearray(path.read_bytes())
    struct.pack_into("<L", data, data.rindex(b"archive/data/0") - CENTRAL.size + WHERE["offset"][0], IN_ZIP64)
    path.write_bytes(data)


def far_directory(path: Path) -> None:
    """A file of torch.save that claims a directory beyond the largest possible file."""
    torch.save({"w": torch.ones(4)}, path)
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, len(data) - END.size - LOCATOR64.size - 8, 1 << 63)
    struct.pack_into("<L", data, len(data) - 6, IN_ZIP64)
    path.write_bytes(data)


def empty_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")


def deep(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b/data.pkl", GOOD_PICKLE)
        archive.writestr("a/b/data/0", bytes(64))


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
    "an offset of 64 bits": (far_record, "does not begin where"),
    "a directory at an offset of 64 bits": (far_directory, "does not end where"),
    "a packed size of its own": (edited("data/0", packed=8), "is compressed"),
    "an offset past the end": (edited("data/0", offset=2 * GB), "does not begin where"),
    "a 64-bit offset left out": (edited("data/0", offset=0xFFFFFFFF), "lacks the 64-bit size"),
    "a record on top of another": (edited("data/1", offset=60), "overlaps another"),
    "two records with one place": (edited("data/0", offset=0), "overlaps another|does not begin where"),
    "a record marked as a folder": (edited("data/0", attributes=0x10), "marked as a folder"),
    "an encrypted record": (edited("data/0", flags=1), "is encrypted"),
    "a wrong CRC of the pickle": (edited("data.pkl", crc=7), "own CRC-32"),
    "a directory of 4 GB": (with_end(2, 0xFFFFFFF0, 0), "does not end where"),
    "a directory of 3 GB that is there": (with_end(2, 3 * GB, 0, hole=3 * GB), "does not end where|more than any"),
    "a directory beyond the limit": (with_end(2, GB, 0, hole=GB), "does not end where|more than any"),
    "more records than listed": (
        lambda path: with_end(3, *directory_of(write_pth(path, GOOD_PICKLE)))(path),
        "end record says 3",
    ),
    "two pickles": (with_another("other/data.pkl"), "2 records named data.pkl"),
    "one name twice": (with_another("archive/data/0"), "duplicate record names"),
    "a pickle in capitals beside it": (with_another("archive/DATA.PKL"), "duplicate record names|2 records named"),
    "a storage in capitals beside it": (with_another("archive/Data/0"), "duplicate record names"),
    "a byte order in capitals": (with_another("archive/BYTEORDER"), "is not where torch.save would put it"),
    "a record outside the folder": (with_another("other/data/0"), "is not where torch.save would put it"),
    "a pickle two folders deep": (deep, "is not where torch.save would put it"),
    "two end records": (two_end_records, "two end records"),
    "no pickle": (empty_zip, "0 records named data.pkl"),
    "a comment behind the directory": (with_comment, "is not at the end of the file"),
    "big-endian numbers": (big_endian, "big-endian"),
    "an old torch file": (without_zip, "before 1.6"),
    "safetensors": (lambda path: path.write_bytes(struct.pack("<Q", 2) + b"{}"), "is a safetensors file"),
    "anything": (lambda path: path.write_bytes(b"some text"), "is not a .pth"),
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
    archive_length(path)  # `verify` calls it too


def test_a_cut_file_that_claims_exabytes_is_only_measured(tmp_path):
    pickle_data = pickled({"w": Tensor((1,), (1,), 0, Storage((1 << 62) - 1, torch.DoubleStorage))})
    heads = {
        name: LOCAL.pack(LOCAL_SIGNATURE, 0, 0, 8, 0, 0, 0, 0, 0, len(name), 0) + name
        for name in (b"archive/data.pkl", b"archive/data/0")
    }
    path = tmp_path / "cut.pth"
    path.write_bytes(heads[b"archive/data.pkl"] + pickle_data + b"PK\7\x08" + bytes(12) + heads[b"archive/data/0"] + bytes(8))
    assert archive_length(path) > 1 << 64


def test_a_zip_within_the_zip_is_only_bytes(tmp_path):
    inner = write_pth(tmp_path / "inner.zip", BOMB, {}, zipfile.ZIP_DEFLATED).read_bytes()
    inner += bytes(-len(inner) % 4)
    claimed = Tensor((1,), (1,), 0, Storage(len(inner) // 4))
    path = write_pth(tmp_path / "outer.pth", pickled({"w": claimed}), {"0": inner})
    with little_memory_and_time(megabytes=5):
        assert inspect_pth(path)["w"].storage_nbytes == len(inner)


@pytest.mark.attack
@settings(max_examples=attempts(300), deadline=None)
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
