"""Load shards: the same numbers in any layout, little memory, and no code executed."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attempts import attempts
from llama_ref.args import ModelArgs
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.formats.lazy_tensor import LazyTensor
from llama_ref.checkpoint.formats.safetensors_writer import write_safetensors
from llama_ref.checkpoint.hf.config import make_config
from llama_ref.checkpoint.hf.names import hf_name
from llama_ref.checkpoint.loading.empty_model import model_without_memory
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.checkpoint.reader import is_tied, release_pages
from llama_ref.errors import CheckpointError
from llama_ref.model import Transformer
from llama_ref.parallel.sharding import split_dim
from make_random_checkpoint import make_random_checkpoint

TINY = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 8,
    "vocab_size": 320,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
SPLITS = {"tok_embeddings": 0, "output": 0, "wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}
NORMS = ("attention_norm", "ffn_norm", "norm")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads mappings and memory use from /proc")


def load(folder: Path, dtype: torch.dtype = torch.bfloat16, **options) -> Transformer:
    opened = open_folder(folder)
    return load_model(opened, ModelArgs.from_json(opened.params), dtype=dtype, **options)


def shard(folder: Path, number: int = 0) -> Path:
    return folder / f"consolidated.{number:02d}.pth"


def weights_of(folder: Path, number: int = 0) -> dict[str, Tensor]:
    return torch.load(shard(folder, number), weights_only=True)


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A folder of one bfloat16 shard."""
    return make_random_checkpoint(tmp_path / "tiny", TINY)


@pytest.fixture
def alter(tiny) -> Callable[..., Path]:
    """Rewrite the tiny folder's shard with tensors added, replaced or (None) removed."""

    def write(**changes) -> Path:
        weights = weights_of(tiny) | {name.replace("__", "."): value for name, value in changes.items()}
        torch.save({name: value for name, value in weights.items() if value is not None}, shard(tiny))
        return tiny

    return write


def refusal(folder: Path, dtype: torch.dtype = torch.bfloat16) -> str:
    with pytest.raises(CheckpointError) as error:
        load(folder, dtype)
    return str(error.value)


@pytest.mark.parametrize("name", [*SPLITS, *NORMS])
def test_where_shards_cut_each_tensor(name):
    assert split_dim(f"layers.3.attention.{name}.weight") == split_dim(f"{name}.weight") == SPLITS.get(name)


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_any_number_of_shards_gives_the_same_model(tmp_path, shards, tied):
    expected = weights_of(make_random_checkpoint(tmp_path / "whole", TINY, seed=3, tied=tied))
    model = load(make_random_checkpoint(tmp_path / "split", TINY, seed=3, tied=tied, shards=shards))
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, expected[name]), name
    assert (model.output.weight is model.tok_embeddings.weight) is tied
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_weights_are_cast_from_any_dtype_to_any(tmp_path, shards, stored, wanted):
    expected = weights_of(make_random_checkpoint(tmp_path / "whole", TINY, dtype=stored))
    folder = make_random_checkpoint(tmp_path / "split", TINY, dtype=stored, shards=shards)
    for name, tensor in load(folder, wanted).state_dict().items():
        assert tensor.dtype == wanted and torch.equal(tensor, expected[name].to(wanted)), name
    assert {tensor.dtype for tensor in weights_of(folder).values()} == {stored}


def test_shards_of_different_dtypes_fit_together(tmp_path):
    expected = weights_of(make_random_checkpoint(tmp_path / "whole", TINY))
    folder = make_random_checkpoint(tmp_path / "split", TINY, shards=2)
    torch.save({name: tensor.float() for name, tensor in weights_of(folder, 1).items()}, shard(folder, 1))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(folder).state_dict().items())


def test_default_dtype_and_device_of_the_process_change_nothing(tiny):
    expected = weights_of(tiny)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            state = load(tiny).state_dict()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("form", ["both names on one storage", "only the embedding"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tied_output_is_one_tensor(tmp_path, shards, form, dtype):
    folder = make_random_checkpoint(tmp_path / "tied", TINY, shards=shards, tied=True)
    if form == "only the embedding":
        for number in range(shards):
            weights = weights_of(folder, number)
            del weights["output.weight"]
            torch.save(weights, shard(folder, number))
    model = load(folder, dtype)
    assert model.output.weight is model.tok_embeddings.weight
    names = [name for name, _ in model.named_parameters()]
    assert "tok_embeddings.weight" in names and "output.weight" not in names  # counted and moved once
    assert torch.equal(model.output.weight[:40], weights_of(folder)["tok_embeddings.weight"][:40].to(dtype))
    assert is_tied(open_folder(folder))


def test_equal_numbers_in_two_places_are_two_tensors(alter, tiny):
    """Further training must be able to change them separately."""
    folder = alter(output__weight=weights_of(tiny)["tok_embeddings.weight"].clone())
    model = load(folder)
    assert torch.equal(model.output.weight, model.tok_embeddings.weight)
    assert model.output.weight.data_ptr() != model.tok_embeddings.weight.data_ptr()
    assert not is_tied(open_folder(folder))


def test_rope_freqs_are_ignored(alter, tiny):
    expected = weights_of(tiny)
    state = load(alter(rope__freqs=torch.rand(4))).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("form", [OrderedDict, lambda d: {k: torch.nn.Parameter(v) for k, v in d.items()}])
def test_other_wrappings_of_the_same_tensors_are_read(tiny, form):
    expected = weights_of(tiny)
    torch.save(form(expected), shard(tiny))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(tiny).state_dict().items())


def test_strided_tensors_are_read_as_what_they_show(alter, tiny):
    expected = weights_of(tiny)
    turned = expected["layers.0.attention.wq.weight"].T.contiguous().T
    repeated = expected["layers.1.feed_forward.w1.weight"][:1].expand(192, 64)
    folder = alter(layers__0__attention__wq__weight=turned, layers__1__feed_forward__w1__weight=repeated)
    for dtype in (torch.bfloat16, torch.float32):
        state = load(folder, dtype).state_dict()
        assert torch.equal(state["layers.0.attention.wq.weight"], turned.to(dtype))
        assert torch.equal(state["layers.1.feed_forward.w1.weight"], repeated.to(dtype))


@on_linux
def test_letting_go_of_pages_spares_what_lies_behind_repeated_rows():
    """Its nbytes counts repeated rows: releasing that many bytes would release others' pages."""
    memory = torch.ones(4 << 20)
    release_pages(memory[:64].expand(65536, 64))
    assert memory.all()


# Tensors that do not fit ------------------------------------------------------------------------------------------------------


def test_all_misfits_are_in_one_error(alter, tmp_path):
    folder = alter(
        norm__weight=None,
        layers__1__attention__wq__weight=None,
        output__weight=torch.zeros(321, 64),
        layers__0__ffn_norm__weight=torch.zeros(1, 64),
        layers__0__attention__wk__weight=torch.zeros(64, 64, dtype=torch.int8),
        layers__0__attention__wv__weight=torch.zeros(64, 64, dtype=torch.float64),
        layers__2__attention_norm__weight=torch.zeros(64),
    )
    file = "consolidated.00.pth"
    heading, *lines = refusal(folder).splitlines()
    assert heading == f"{folder}: the weights do not fit params.json:"
    assert sorted(lines) == sorted(
        [
            f"  {file}: norm.weight is missing, expected shape (64,)",
            f"  {file}: layers.1.attention.wq.weight is missing, expected shape (64, 64)",
            f"  {file}: output.weight has shape (321, 64), expected (320, 64)",
            f"  {file}: layers.0.ffn_norm.weight has shape (1, 64), expected (64,)",
            f"  {file}: layers.0.attention.wk.weight is int8, expected bfloat16, float16 or float32",
            f"  {file}: layers.0.attention.wv.weight is float64, expected bfloat16, float16 or float32",
            f"  {file}: layers.2.attention_norm.weight (64,) is unexpected",
        ]
    )


def test_the_shard_at_fault_is_named(tmp_path):
    folder = make_random_checkpoint(tmp_path / "split", TINY, shards=4)
    weights = weights_of(folder, 2)
    weights["layers.0.attention.wo.weight"] = weights["layers.0.attention.wo.weight"].T.contiguous()
    del weights["output.weight"]
    torch.save(weights, shard(folder, 2))
    assert refusal(folder).splitlines()[1:] == [
        "  consolidated.02.pth: layers.0.attention.wo.weight has shape (16, 64), expected (64, 16)",
        "  consolidated.02.pth: output.weight is missing, expected shape (80, 64)",
    ]


def test_a_long_list_of_misfits_is_cut(tiny):
    strays = {f"stray.{i}": torch.zeros(1) for i in range(100)}
    torch.save({"norm.weight": torch.zeros(TINY["dim"])} | strays, shard(tiny))
    lines = refusal(tiny).splitlines()
    n_expected = len(Transformer(ModelArgs.from_dict(TINY)).state_dict()) - 2  # the norm; no output: tied
    assert len(lines) == 14
    assert lines[-1] == f"  … and {n_expected + 100 - 12} more"


def test_shards_of_two_models_are_recognized_by_their_norms(tmp_path):
    folder, other = (make_random_checkpoint(tmp_path / str(seed), TINY, shards=2, seed=seed) for seed in (0, 1))
    shard(other, 1).rename(shard(folder, 1))
    assert "consolidated.00.pth and consolidated.01.pth hold different copies of " in refusal(folder)


@pytest.mark.parametrize("present", [1, 2])
def test_too_few_shards_do_not_pass_for_a_whole(tmp_path, present):
    folder = make_random_checkpoint(tmp_path / "split", TINY, shards=4)
    for number in range(present, 4):
        shard(folder, number).unlink()
    missing = ", ".join(shard(folder, number).name for number in range(present, 4))
    assert refusal(folder).endswith(f"split lacks {missing}: the shapes of the tensors imply 4 shards; fetch what is missing")


def test_shards_that_cannot_be_equal_parts_are_refused(tmp_path):
    whole = weights_of(make_random_checkpoint(tmp_path / "whole", TINY | {"vocab_size": 322}))
    folder = tmp_path / "split"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(TINY | {"vocab_size": 322}))
    for number in range(3):
        dims = {name: split_dim(name) for name in whole}
        parts = {n: t if dims[n] is None else t.narrow(dims[n], 0, t.shape[dims[n]] // 3).clone() for n, t in whole.items()}
        torch.save(parts, shard(folder, number))
    assert "3 shards cannot hold equal parts of tok_embeddings.weight (322, 64) (from params.json)" in refusal(folder)


# Other files ------------------------------------------------------------------------------------------------------------------


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda whole: whole[: int(len(whole) * share)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda _: b"<!DOCTYPE html><html>" + b" " * 16_000,
            "is an HTML page, not a .pth of weights: the download link had expired",
        ),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not .* `git lfs pull`"),
        (lambda _: b"", "is an empty file, not"),
        (lambda whole: b"\0" * len(whole), "is a run of zero bytes, not"),
        (lambda _: b"GGUF\3\0\0\0", r"is not a \.pth written by torch\.save"),
        (lambda whole: whole[1:], r"is not a \.pth written by torch\.save"),
        *((cut(share), "zip directory is not at the end of the file") for share in (0.01, 0.5, 0.999)),
        (lambda whole: whole[:-1], "zip directory is not at the end of the file"),
        (lambda whole: whole[:4000] + whole[9000:], "zip directory does not end where"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_described(tiny, change, says):
    shard(tiny).write_bytes(change(shard(tiny).read_bytes()))
    message = refusal(tiny)
    assert re.search(says, message) and message.startswith(str(shard(tiny)))
    with pytest.raises(CheckpointError, match=says):
        is_tied(open_folder(tiny))


def zip_of_something_else(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")


@pytest.mark.parametrize(
    ("save", "says"),
    [
        (zip_of_something_else, "it may be a zip of something else"),
        (lambda path: torch.save({}, path, _use_new_zipfile_serialization=False), r"torch's format before 1\.6"),
        (lambda path: path.write_bytes(pickle.dumps({})), "is a bare pickle"),
        (lambda path: torch.save([torch.zeros(2)], path), "list, expected a dictionary of tensors"),
        (lambda path: torch.save(torch.zeros(2), path), "Tensor, expected a dictionary"),
        (lambda path: torch.save(None, path), "NoneType, expected a dictionary"),
        (lambda path: torch.save({1: torch.zeros(2)}, path), "int as a key, expected tensor names"),
        (lambda path: torch.save({"model": {"w": torch.zeros(2)}}, path), "its entry 'model' is a dictionary"),
        (lambda path: torch.save({"w": torch.zeros(2), "step": 7}, path), "its entry 'step' is a value of type int"),
        (lambda path: path.unlink() or path.mkdir(), "is not a plain file"),
    ],
)
def test_what_holds_something_else_is_refused(tiny, save, says):
    save(shard(tiny))
    message = refusal(tiny)
    assert re.search(says, message) and message.startswith(str(shard(tiny)))


@pytest.mark.filterwarnings("ignore:.*(prototype|beta state)")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (Tensor.to_sparse, "sparse tensors"),
        (Tensor.to_sparse_csr, "sparse tensors"),
        (lambda tensor: tensor.to(torch.complex64), "complex tensors"),
        (lambda tensor: tensor.to("meta"), "_rebuild_meta_tensor_no_storage"),
        (lambda tensor: torch.nested.nested_tensor([tensor[:1, 0], tensor[:2, 0]]), "_rebuild_nested_tensor"),
    ],
)
def test_tensors_that_are_not_dense_are_refused(alter, tiny, make, kind):
    folder = alter(tok_embeddings__weight=make(weights_of(tiny)["tok_embeddings.weight"]))
    for dtype in (torch.bfloat16, torch.float32):
        message = refusal(folder, dtype)
        assert kind in message and message.startswith(str(shard(folder)))
    with pytest.raises(CheckpointError, match=kind):
        is_tied(open_folder(folder))


def test_a_shard_without_embedding_is_neither_tied_nor_not(alter):
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth holds no tok_embeddings\.weight; it is not a shard"):
        is_tied(open_folder(alter(tok_embeddings__weight=None)))


class Payload:
    """Creates a file when it is unpickled without restrictions."""

    def __init__(self, trace: Path, call: Callable):
        self.trace, self.call = str(trace), call

    def __reduce__(self):
        return {
            os.system: (os.system, (f"touch {self.trace}",)),
            open: (open, (self.trace, "w")),
            eval: (eval, (f"open({self.trace!r}, 'w')",)),
            subprocess.call: (subprocess.call, (["touch", self.trace],)),
        }[self.call]


@pytest.mark.parametrize("call", [os.system, open, eval, subprocess.call])
@pytest.mark.parametrize("place", ["a value", "a key", "the whole", "beside the weights"])
def test_nothing_in_a_pickle_runs(tiny, tmp_path, monkeypatch, call, place):
    trace = tmp_path / "trace"
    payload = Payload(trace, call)
    contents = {
        "a value": {"tok_embeddings.weight": payload},
        "a key": {payload: torch.zeros(2)},
        "the whole": payload,
        # Ignored tensors are checked too.
        "beside the weights": weights_of(tiny) | {"rope.freqs": payload},
    }[place]
    torch.save(contents, shard(tiny))
    torch.load(shard(tiny), weights_only=False)
    assert trace.exists()  # the payload works without restrictions
    trace.unlink()

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    message = refusal(tiny)
    assert re.search(r"asks Python to use .*: nothing was run here, do not load it elsewhere", message)
    assert message.startswith(str(shard(tiny)))
    with pytest.raises(CheckpointError, match="nothing was run here"):
        is_tied(open_folder(tiny))
    assert not trace.exists()


@pytest.fixture(scope="module")
def victim(tmp_path_factory) -> tuple[Path, bytes, int, int]:
    """A folder to damage, its shard's bytes, and the pickle's offset and length in them."""
    folder = make_random_checkpoint(tmp_path_factory.mktemp("victim") / "tiny", TINY | {"n_layers": 1})
    whole = shard(folder).read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    return folder, whole, whole.index(data), len(data)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, for unusual pickle protocols
@pytest.mark.attack
@given(data=st.data())
@settings(max_examples=attempts(300))
def test_damaged_archives_raise_nothing_else(victim, data):
    folder, whole, begin, length = victim
    size = len(whole)
    ranges = {"pickle": (begin, begin + length), "head": (0, 64), "directory": (size - 3000, size)}
    low, high = ranges[data.draw(st.sampled_from([*ranges]))]
    damaged = bytearray(whole)
    for _ in range(data.draw(st.sampled_from([1, 1, 2, 5]))):
        damaged[data.draw(st.integers(low, high - 1))] = data.draw(st.integers(0, 255))
    shard(folder).write_bytes(damaged)
    try:
        model = load(folder, torch.float32)
    except CheckpointError as error:
        assert str(folder) in str(error)
    else:
        assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


# Memory ----------------------------------------------------------------------------------------------------------------------


def test_progress_rises_to_the_whole(tmp_path):
    for shards in (1, 4):
        folder = make_random_checkpoint(tmp_path / str(shards), TINY, shards=shards, tied=True)
        calls = []
        load(folder, progress=lambda done, total: calls.append((done, total)))  # noqa: B023, called at once
        done, totals = zip(*calls, strict=True)
        assert list(done) == sorted(set(done)) and set(totals) == {done[-1]}
        embedding_and_norms = 2 * (320 * 64 + shards * 5 * 64)
        assert done[-1] > embedding_and_norms and len(calls) == len(weights_of(folder)) - 1


def mapped_from(path: Path) -> list[range]:
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if line[-1] == str(path)]
    return [range(int(begin, 16), int(end, 16)) for begin, end in spans]


@on_linux
def test_where_nothing_changes_parameters_are_the_files_own_pages(tmp_path):
    for shards in (1, 2):
        folder = make_random_checkpoint(tmp_path / str(shards), TINY, shards=shards)
        model = load(folder)
        spans = mapped_from(shard(folder).resolve())
        in_file = {name: any(p.data_ptr() in span for span in spans) for name, p in model.named_parameters()}
        assert all(in_file[name] == (shards == 1 or name.split(".")[-2] in NORMS) for name in in_file)
    cast = load(tmp_path / "1", torch.float32)
    assert not any(
        parameter.data_ptr() in span for parameter in cast.parameters() for span in mapped_from(shard(tmp_path / "1"))
    )


def test_changing_a_mapped_parameter_does_not_change_the_file(tiny):
    before = shard(tiny).read_bytes()
    load(tiny).tok_embeddings.weight.zero_()
    assert shard(tiny).read_bytes() == before


LARGE = TINY | {"dim": 1024, "n_layers": 6, "n_heads": 16, "n_kv_heads": 4, "vocab_size": 8192, "multiple_of": 256}
MEASURE = textwrap.dedent("""
    import os, sys
    from pathlib import Path
    import torch
    from llama_ref.checkpoint.folder import open_folder
    from llama_ref.parallel.sharding import Share
    from llama_ref.checkpoint.loading.loader import load_model

    def load(path, dtype, **options):
        folder = open_folder(path)
        return load_model(folder, folder.read_args(), dtype=dtype, **options)

    def look_at(model):  # read mapped pages, so that they count
        for parameter in model.parameters():
            if not parameter.is_meta:
                parameter.max()

    def peak():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    root = Path(sys.argv[1])
    whole, quarter, in_stages = (), (2, 4), (1, 2, 1, 2)
    cases = [(shards, dtype, whole) for shards in (1, 4) for dtype in ("bfloat16", "float32")]
    cases += [(shards, "bfloat16", share) for shards in (1, 4, "hf") for share in (quarter, in_stages)]
    cases += [("hf", "bfloat16", whole)]
    for shards, dtype, share in cases:
        if os.fork():  # a new process has a new peak
            os.wait()
            continue
        for first in (torch.float32, torch.bfloat16):  # the libraries' first use
            look_at(load(root / "tiny", first))
            torch.zeros(1 << 16, dtype=first).max()  # on several threads
        before = peak()
        model = load(root / str(shards), getattr(torch, dtype), share=Share(*share))
        look_at(model)
        weights = sum(p.nbytes for p in model.parameters() if not p.is_meta)
        print(shards, dtype, "/".join(map(str, share)) or "whole", peak() - before, weights, flush=True)
        os._exit(0)
""")


@pytest.fixture(scope="module")
def measured(warm) -> dict[tuple[str, str, str], tuple[int, int]]:
    """(peak bytes of loading 85 million weights, their bytes) by shards, dtype and share."""
    model = model_without_memory(ModelArgs.from_dict(LARGE))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    # In /dev/shm, Linux maps little more than the pages that are read. From a disk's page cache it
    # maps about 2 MB at a time, which would count as memory. pytest's folder would be kept.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for shards in (1, 4):
            root = Path(folder) / str(shards)
            root.mkdir()
            (root / "params.json").write_text(json.dumps(LARGE))
            cuts = {name: [shards if axis == split_dim(name) else 1 for axis in range(len(shapes[name]))] for name in shapes}
            parts = {name: [n // cut for n, cut in zip(shapes[name], cuts[name], strict=True)] for name in shapes}
            weights = {name: torch.ones(part, dtype=torch.bfloat16) for name, part in parts.items()}
            for number in range(shards):
                torch.save(weights, shard(root, number))
        (Path(folder) / "hf").mkdir()
        args = ModelArgs.from_dict(LARGE)
        config = make_config(args, tied=False, dtype=torch.bfloat16, bos=0, eos=[1])
        (Path(folder) / "hf" / "config.json").write_text(json.dumps(config))
        tensors = [
            LazyTensor.from_tensor(hf_name(name), torch.ones(shape, dtype=torch.bfloat16)) for name, shape in shapes.items()
        ]
        write_safetensors(Path(folder) / "hf" / "model.safetensors", tensors)
        del tensors
        make_random_checkpoint(Path(folder) / "tiny", TINY, shards=4)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads do not survive a fork
        command = [warm / "python", "-c", MEASURE, folder]
        root = Path(__file__).resolve().parents[3]
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    return {(shards, dtype, share): (int(taken), int(weights)) for shards, dtype, share, taken, weights in rows}


@on_linux
@pytest.mark.parametrize("shards", ["1", "4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_little_memory_beyond_the_weights(measured, shards, dtype):
    taken, weights = measured[shards, dtype, "whole"]
    assert weights > (160 << 20) * (1 if dtype == "bfloat16" else 2)
    assert 0.95 * weights < taken < 1.10 * weights


@on_linux
@pytest.mark.parametrize("shards", ["1", "4", "hf"])
@pytest.mark.parametrize(("share", "fraction"), [("2/4", 0.25), ("1/2/1/2", 0.25)], ids=["third of 4", "2 parts in 2 stages"])
def test_a_process_of_several_takes_little_memory_beyond_its_share(measured, shards, share, fraction):
    taken, weights = measured[shards, "bfloat16", share]
    assert weights == pytest.approx(measured[shards, "bfloat16", "whole"][1] * fraction, rel=0.05)
    a_few_tables = 1 << 20  # page tables of each mapped file
    assert 0.95 * weights < taken < 1.10 * weights + a_few_tables
