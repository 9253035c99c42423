"""Weight files written block by block: read back by torch and safetensors, cleaned up on errors."""

import errno
import random
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llama_ref.checkpoint.formats.atomic import check_free_space, new_folder
from llama_ref.checkpoint.formats.lazy_tensor import LazyTensor, row_blocks
from llama_ref.checkpoint.formats.pth import archive_records, inspect_pth
from llama_ref.checkpoint.formats.pth_length import archive_length
from llama_ref.checkpoint.formats.pth_writer import write_pth
from llama_ref.checkpoint.formats.safetensors_writer import DTYPE_NAMES, write_safetensors
from llama_ref.checkpoint.verify.weight_scan import WeightScan, scan_weights
from llama_ref.errors import CheckpointError, RequestError

REPOSITORY = Path(__file__).resolve().parents[3]
WRITERS = pytest.mark.parametrize("write", [write_pth, write_safetensors])
TIED = {"output.weight": "tok_embeddings.weight"}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8)


def some_tensors() -> dict[str, torch.Tensor]:
    """Odd sizes, all dtypes, an empty and a transposed tensor, a name that is not ASCII."""
    torch.manual_seed(0)
    tensors = {f"of.{dtype}".removeprefix("torch."): (9 * torch.randn(5, 7)).to(dtype) for dtype in DTYPES}
    matrix = torch.randn(33, 17).bfloat16()
    return {
        "tok_embeddings.weight": matrix,
        "norm.weight": torch.ones(13),
        "한글.weight": matrix.T,
        "empty": torch.zeros(0, 3),
        "cube": torch.arange(24, dtype=torch.uint8).view(2, 3, 4),
        "flags": torch.tensor([True, False, True]),
        **tensors,
    }


def lazy(tensors: dict[str, torch.Tensor], rows: int = 4) -> list[LazyTensor]:
    return [LazyTensor(name, tuple(t.shape), t.dtype, lambda t=t: t.split(rows)) for name, t in tensors.items()]


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == t.dtype and found[name].shape == t.shape and torch.equal(found[name], t)
        for name, t in expected.items()
    )


def records_of(path: Path) -> dict[str, int]:
    """Sizes of the records by name, without the archive's name."""
    return {record.name.partition("/")[2]: record.size for record in archive_records(path)}


@pytest.fixture(params=["as it is", "zip64"])
def path(request, tmp_path, monkeypatch) -> Path:
    """The file to write; with "zip64", zipfile treats sizes and offsets from 100 bytes as large."""
    if request.param == "zip64":
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    return tmp_path / "consolidated.00.pth"


def test_every_dtype_that_safetensors_names_is_written_and_read_back(tmp_path):
    numbers = torch.arange(48, dtype=torch.uint8).view(2, 24)
    numbers[:, ::8] = 1  # a bool is 0 or 1
    tensors = {name: numbers.view(dtype) if dtype != torch.bool else numbers == 1 for dtype, name in DTYPE_NAMES.items()}
    write_safetensors(tmp_path / "model.safetensors", lazy(tensors, rows=1))
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys() and len(found) >= 16
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_back_the_same_bits(path, mmap):
    tensors = some_tensors()
    write_pth(path, lazy(tensors), TIED)
    found = torch.load(path, weights_only=True, mmap=mmap)
    assert same(found, tensors | {"output.weight": tensors["tok_embeddings.weight"]})
    assert found["output.weight"].untyped_storage().data_ptr() == found["tok_embeddings.weight"].untyped_storage().data_ptr()
    assert all(tensor.is_contiguous() for tensor in found.values())
    with torch.device("meta"):
        skeleton = torch.load(path, weights_only=True, map_location="meta")
    assert {name: tensor.shape for name, tensor in skeleton.items()} == {name: t.shape for name, t in found.items()}


def test_our_strict_readers_and_unzip_find_nothing_wrong(path):
    tensors = some_tensors()
    write_pth(path, lazy(tensors), TIED)
    infos = inspect_pth(path)
    assert {name: info.shape for name, info in infos.items()} == {
        name: tuple(t.shape) for name, t in (tensors | {"output.weight": tensors["tok_embeddings.weight"]}).items()
    }
    assert infos["output.weight"] == infos["tok_embeddings.weight"]
    assert all(info.is_contiguous for info in infos.values())
    records = archive_records(path)
    assert {record.data_offset % 64 for record in records} == {0}
    assert all(record.crc for record in records if record.size)
    assert scan_weights(path, infos, values=True) == WeightScan()
    assert archive_length(path) == path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert (b"\xff" * 8 in path.read_bytes()) is (zipfile.ZIP64_LIMIT == 100)  # zip64 field
    if shutil.which("unzip"):
        unzipped = subprocess.run(["unzip", "-tqq", path], capture_output=True, text=True)
        assert (unzipped.returncode, unzipped.stdout) == (0, "")


def test_a_file_cut_short_or_grown_shows_how_long_it_was(tmp_path):
    write_pth(tmp_path / "a.pth", lazy(some_tensors()))
    whole = (tmp_path / "a.pth").read_bytes()
    for missing in (1, 30, 60, 90, 120, 200, 1000):
        (tmp_path / "cut.pth").write_bytes(whole[:-missing])
        assert archive_length(tmp_path / "cut.pth") == len(whole), missing
    (tmp_path / "grown.pth").write_bytes(whole + b"x" * 50)
    assert archive_length(tmp_path / "grown.pth") == len(whole)


def test_a_flipped_bit_is_found_by_the_crc(tmp_path):
    path = tmp_path / "a.pth"
    write_pth(path, lazy({"w": torch.ones(1000)}))
    offset = inspect_pth(path)["w"].data_offset + 2000
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x01")
    assert scan_weights(path, inspect_pth(path), values=False).wrong_crc == ["a/data/0"]


def test_the_archive_is_laid_out_as_torch_saves_it(tmp_path):
    tensors = some_tensors()
    write_pth(tmp_path / "a.pth", lazy(tensors), TIED)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    (tmp_path / "torch").mkdir()
    torch.save(tensors | {"output.weight": tensors["tok_embeddings.weight"]}, tmp_path / "torch" / "a.pth")
    ours, theirs = zipfile.ZipFile(tmp_path / "a.pth"), zipfile.ZipFile(tmp_path / "torch" / "a.pth")
    only_in_torch = {"a/.format_version", "a/.storage_alignment"}  # since torch 2.7
    assert ours.namelist() == [name for name in theirs.namelist() if name not in only_in_torch]
    for name in ours.namelist():
        if name == "a/.data/serialization_id":  # the hash of the others
            assert len(ours.read(name)) == len(theirs.read(name))
        elif name != "a/data.pkl":
            assert ours.read(name) == theirs.read(name), name
    assert (
        records_of(tmp_path / "a.pth").items() <= records_of(tmp_path / "torch" / "a.pth").items()
    )  # data.pkl has the same length too
    ours_in = {name: (i.shape, i.stride, i.storage_key) for name, i in inspect_pth(tmp_path / "a.pth").items()}
    theirs_in = {name: (i.shape, i.stride, i.storage_key) for name, i in inspect_pth(tmp_path / "torch" / "a.pth").items()}
    assert list(ours_in.items()) == list(theirs_in.items())


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_pth(tmp_path / folder / "a.pth", lazy(some_tensors(), rows=3 if folder == "one" else 100))
    assert (tmp_path / "one" / "a.pth").read_bytes() == (tmp_path / "two" / "a.pth").read_bytes()


def test_a_name_beyond_ascii_is_read_too(tmp_path):
    write_pth(tmp_path / "가중치.pth", lazy({"w": torch.ones(3)}))
    assert same(torch.load(tmp_path / "가중치.pth", mmap=True), {"w": torch.ones(3)})
    assert archive_records(tmp_path / "가중치.pth")[0].name == "archive/data.pkl"


def test_safetensors_reads_back_the_same_bits(tmp_path):
    path, tensors = tmp_path / "model.safetensors", some_tensors()
    write_safetensors(path, lazy(tensors))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(load_file(path), tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_slice("tok_embeddings.weight")[5:9, 3:], tensors["tok_embeddings.weight"][5:9, 3:])
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 8 == 0


def test_safetensors_keep_the_given_order(tmp_path):
    names = [f"layers.{number}.weight" for number in range(20)]
    random.Random(0).shuffle(names)
    write_safetensors(tmp_path / "a.safetensors", lazy({name: torch.full((3,), 1.0) for name in names}))
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert list(file.offset_keys()) == names


@WRITERS
def test_progress_counts_every_byte_and_tensors_are_produced_one_by_one(tmp_path, write):
    events = []

    def make(name: str):
        events.append(name)
        yield from torch.ones(6, 4).split(4)

    tensors = [LazyTensor(name, (6, 4), torch.float32, lambda name=name: make(name)) for name in "abc"]
    write(tmp_path / "file", tensors, progress=events.append)
    assert events == ["a", 64, 32, "b", 64, 32, "c", 64, 32]


def test_row_blocks_are_views_of_whole_rows():
    tensor = torch.arange(70).view(10, 7)
    blocks = list(row_blocks(tensor, 2 * 7 * 8 + 50))
    assert [len(block) for block in blocks] == [2, 2, 2, 2, 2]
    assert torch.equal(torch.cat(blocks), tensor)
    assert blocks[0].data_ptr() == tensor.data_ptr()
    assert [len(block) for block in row_blocks(tensor, 1)] == [1] * 10
    assert sum(block.numel() for block in row_blocks(torch.zeros(0, 3))) == 0


MEMORY = """
import sys, torch
from pathlib import Path
from llama_ref.checkpoint.formats.lazy_tensor import LazyTensor
from llama_ref.checkpoint.formats.pth_writer import write_pth
from llama_ref.checkpoint.formats.safetensors_writer import DTYPE_NAMES, write_safetensors
def peak(): return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1])
def tensors(n_blocks):
    def blocks():
        for number in range(n_blocks):
            yield torch.full((4 << 10, 1 << 10), number, dtype=torch.bfloat16)  # 8 MB
    return [LazyTensor(name, (n_blocks * 4 << 10, 1 << 10), torch.bfloat16, blocks) for name in "ab"]
def write(name, n_blocks):
    write_pth(Path(sys.argv[1]) / f"{name}.pth", tensors(n_blocks))
    write_safetensors(Path(sys.argv[1]) / f"{name}.safetensors", tensors(n_blocks))
write("small", 2)
before = peak()
write("large", 12)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_near_one_block(warm, tmp_path):
    assert int(run_python(warm, MEMORY, tmp_path).stdout) < 40_000  # kB, for files of 192 MB in blocks of 8 MB


def run_python(warm: Path, code: str, *arguments: object) -> subprocess.CompletedProcess:
    done = subprocess.run([warm / "python", "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@WRITERS
@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([torch.ones(3, 2)], "the blocks of w have 3 rows, expected 4"),
        ([torch.ones(3, 2), torch.ones(2, 2)], "more than the 4 rows"),
        ([torch.ones(2, 4)], r"a block of w is torch\.float32 of shape \(2, 4\), expected torch\.float32 rows of \(4, 2\)"),
        ([torch.ones(8)], r"of shape \(8,\)"),
        ([torch.ones(4, 2).half()], r"is torch\.float16"),
        ([torch.tensor(1.0)], r"of shape \(\)"),
        ([], "have 0 rows, expected 4"),
    ],
)
def test_blocks_that_do_not_match_their_tensor_are_an_error_and_leave_no_file(tmp_path, write, blocks, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "file", [LazyTensor("w", (4, 2), torch.float32, lambda: blocks)])
    assert not any(tmp_path.iterdir())


@WRITERS
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([LazyTensor.from_tensor("w", torch.ones(1)), LazyTensor.from_tensor("w", torch.ones(2))], "two tensors are named w"),
        ([LazyTensor.from_tensor("w", torch.ones(2, dtype=torch.complex128))], r"w .*complex128"),
        ([LazyTensor("w", (), torch.float32, list)], "w has no dimensions"),
    ],
)
def test_tensors_that_no_file_can_hold_are_an_error(tmp_path, write, tensors, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "file", tensors)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("aliases", [{"b": "nowhere"}, {"a": "a"}])
def test_an_alias_needs_a_tensor_and_a_free_name(tmp_path, aliases):
    with pytest.raises(ValueError, match="cannot be an alias"):
        write_pth(tmp_path / "a.pth", lazy({"a": torch.ones(2)}), aliases)
    assert not any(tmp_path.iterdir())


@WRITERS
def test_an_existing_file_is_left_alone(tmp_path, write):
    (tmp_path / "a").write_text("ten years")
    with pytest.raises(CheckpointError, match=r"cannot write .*/a: File exists; remove it or choose another name"):
        write(tmp_path / "a", lazy({"w": torch.ones(2)}))
    assert (tmp_path / "a").read_text() == "ten years"


# full disks and forbidden folders -------------------------------------------------------------------------------------
@WRITERS
def test_what_cannot_fit_is_refused_before_anything_is_created(tmp_path, write):
    def never():
        raise AssertionError

    tensors = [LazyTensor("w", (1 << 30, 1 << 22), torch.float32, never)]
    with pytest.raises(CheckpointError, match=r"cannot write .*/w: it needs .* TB and .* are free there; free some space"):
        write(tmp_path / "w", tensors)
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*/deep/out: it needs 90 TB and .* free there; free some space"),
        new_folder(tmp_path / "deep" / "out", n_bytes=90 * 10**12),
    ):
        never()
    assert not any(tmp_path.iterdir())
    check_free_space(tmp_path / "deep" / "out", 1000)


LIMITED = """
import resource, sys, torch
from pathlib import Path
from llama_ref.checkpoint.formats.lazy_tensor import LazyTensor
from llama_ref.checkpoint.formats.pth_writer import write_pth
from llama_ref.checkpoint.formats.safetensors_writer import DTYPE_NAMES, write_safetensors
from llama_ref.checkpoint.formats.atomic import new_folder
from llama_ref.errors import CheckpointError
from make_random_checkpoint import make_random_checkpoint
from folders import PARAMS
target = Path(sys.argv[1])
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
tensors = [LazyTensor("w", (3 << 10, 1 << 10), torch.bfloat16, lambda: torch.ones(3 << 10, 1 << 10).bfloat16().split(100))]
def in_new_folder():
    with new_folder(target / "model") as folder:
        (folder / "params.json").write_text("{}")
        write_safetensors(folder / "model.safetensors", tensors)
def as_text():
    with new_folder(target / "model") as folder:
        (folder / "README.md").write_text("x" * (3 << 20))
for act in (
    lambda: write_pth(target / "a.pth", tensors),
    lambda: write_safetensors(target / "a.safetensors", tensors),
    in_new_folder,
    as_text,
    lambda: make_random_checkpoint(target / "random", PARAMS | {"vocab_size": 32 << 10}),
):
    try:
        act()
    except CheckpointError as error:
        print(error, [path.name for path in target.iterdir()])
"""


def refusals(warm: Path, target: Path, how: str) -> list[str]:
    paths = [str(REPOSITORY / folder) for folder in ("tests", "scripts")]
    return run_python(warm, f"import sys; sys.path[:0] = {paths}\n{LIMITED}", target, how).stdout.splitlines()


def test_a_file_that_grows_too_large_leaves_nothing(warm, tmp_path):
    names = ["a.pth", "a.safetensors", "model/model.safetensors", "model", "random/consolidated.00.pth"]
    refused = refusals(warm, tmp_path, "limit")
    assert len(refused) == len(names)
    for name, line in zip(names, refused, strict=True):
        needed = "it needs [4-6].* MB; " if "." in name else ""
        message = rf"cannot write {tmp_path}/{name}: File too large; {needed}files may not be that large there: .* folder \[\]"
        assert re.fullmatch(message, line), line


@pytest.fixture
def small_disk(tmp_path) -> Path:
    """A file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_too_small_is_named_and_left_clean(warm, small_disk):
    refused = refusals(warm, small_disk, "no limit")
    assert len(refused) == 5
    message = rf"cannot write {small_disk}/\S+: it needs .* MB and 2\.\d+ MB are free there; free some space there or .* \[\]"
    assert all(re.fullmatch(message, line) for line in refused if "No space left" not in line)
    assert (
        f"cannot write {small_disk}/model: No space left on device; free some space there or choose another folder []"
        in refused
    )


@WRITERS
def test_a_disk_that_fills_up_while_writing_leaves_no_file(small_disk, write):
    def blocks():
        (small_disk / "others").write_bytes(bytes(1 << 20))
        yield from torch.ones(3 << 8, 1 << 10).bfloat16().split(16)  # 1.5 MB

    with pytest.raises(CheckpointError, match=r"/w: No space left on device; it needs 1\.57 MB; free some space there or"):
        write(small_disk / "w", [LazyTensor("w", (3 << 8, 1 << 10), torch.bfloat16, blocks)])
    assert [path.name for path in small_disk.iterdir()] == ["others"]


def test_a_folder_that_may_not_be_written_is_refused(unprivileged_folder):
    forbidden = unprivileged_folder / "forbidden"
    forbidden.mkdir()
    forbidden.chmod(0o555)
    for target in (forbidden / "out", forbidden / "deep" / "out"):
        with pytest.raises(CheckpointError) as refused, new_folder(target):
            pass
        assert str(refused.value) == f"cannot create {target}: Permission denied; choose another folder"
    with pytest.raises(CheckpointError, match=r"cannot write .*/forbidden/a\.pth: Permission denied; choose another folder"):
        write_pth(forbidden / "a.pth", lazy({"w": torch.ones(2)}))
    assert not any(forbidden.iterdir())
    forbidden.chmod(0)
    with pytest.raises(CheckpointError, match=r"cannot create .*: Permission denied"), new_folder(forbidden / "deep" / "out"):
        pass
    forbidden.chmod(0o755)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file/deep/out", ".*/file is a file, expected a folder"),
        ("x" * 300, "File name too long"),
        ("x" * 250, "File name too long"),
    ],
)
def test_a_target_below_a_file_or_with_too_long_a_name_is_refused(tmp_path, name, reason):
    (tmp_path / "file").write_text("")
    message = f"cannot create .*/{name}: {reason}; choose another folder"
    with pytest.raises((CheckpointError, RequestError), match=message), new_folder(tmp_path / name):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_errors_inside_a_new_folder_name_the_target_folder(tmp_path):
    target = tmp_path / "out"
    message = f"^cannot write {target}: Is a directory; choose another folder$"
    with pytest.raises(CheckpointError, match=message), new_folder(target) as folder:
        (folder / "params.json").mkdir()
        (folder / "params.json").write_text("{}")
    message = "^cannot use /nowhere/file: No such file or directory; nothing was written$"
    with pytest.raises(CheckpointError, match=message), new_folder(target):
        Path("/nowhere/file").read_bytes()
    with pytest.raises(BrokenPipeError), new_folder(target):
        raise BrokenPipeError(errno.EPIPE, "the reader of our output has gone")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("names", "stranger"),
    [
        (["params.json", "consolidated.00.pth", "tokenizer.model", "checklist.chk", "README.md"], None),
        (["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"], None),
        (["special_tokens_map.json", "added_tokens.json", "model.safetensors.index.json"], None),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None),
        (["config.json", "package.json"], "package.json"),
        (["model.safetensors.bak"], "model.safetensors.bak"),
        (["model-1-of-2.safetensors"], "model-1-of-2.safetensors"),
        (["my_config.json"], "my_config.json"),
        (["model-00001-of-00002.safetensors.index.json"], "model-00001-of-00002.safetensors.index.json"),
    ],
)
def test_only_a_folder_of_checkpoint_files_is_replaced(tmp_path, names, stranger):
    out = tmp_path / "out"
    out.mkdir()
    for name in names:
        (out / name).write_text(name)
    with pytest.raises(RequestError, match=r"already holds .*; --force replaces it, or choose another folder"), new_folder(out):
        pass
    if stranger:
        with (
            pytest.raises(RequestError, match=re.escape(f"holds {stranger}, which is not a checkpoint file")),
            new_folder(out, force=True),
        ):
            pass
        assert sorted(path.name for path in out.iterdir()) == sorted(names)
    else:
        with new_folder(out, force=True) as folder:
            (folder / "params.json").write_text("new")
        assert [path.read_text() for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
