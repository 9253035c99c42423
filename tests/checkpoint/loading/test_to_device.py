"""Copies to a GPU through pinned buffers, on a fake device that copies as late as allowed."""

import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from delayed_device import DelayedDevice, host_buffers, loading_through
from folders import PARAMS, byte_tokenizer, tiny_folder
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.checkpoint.loading.to_device import PinnedCopier, pinned_copier
from llama_ref.checkpoint.writing.convert import to_hugging_face, to_meta
from llama_ref.checkpoint.writing.quantized_writer import quantize_folder
from llama_ref.model import Transformer
from llama_ref.parallel.sharding import Share
from llama_ref.quantization.scheme import Scheme
from make_random_checkpoint import make_random_checkpoint

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int8]
SMALL = PARAMS | {"dim": 128, "multiple_of": 64}
SCHEMES = {"int8": "int8", "int4": "int4:group=32"}
ROOT = Path(__file__).resolve().parents[3]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads memory use from /proc")


@st.composite
def strided(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, *, is_target: bool) -> Tensor:
    """A tensor of random numbers: contiguous, part of a larger one, or with permuted dimensions."""
    larger = [n + draw(st.integers(0, 3)) for n in shape]
    order = draw(st.permutations(range(len(shape))))
    data = torch.randint(-100, 100, [larger[i] for i in order]).to(dtype)
    data = data.permute([order.index(i) for i in range(len(shape))])
    for dim, n in enumerate(shape):
        data = data.narrow(dim, draw(st.integers(0, data.shape[dim] - n)), n)
    return data.zero_() if is_target else data


@given(data=st.data())
def test_any_tensor_arrives_through_buffers_of_any_size(data):
    device = DelayedDevice()
    n_bytes = 8 * data.draw(st.integers(1, 40))  # down to less than a row
    copier = PinnedCopier(host_buffers(n_bytes, data.draw(st.integers(1, 3))), device.submit)
    expected, targets = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=3)))
        stored, wanted = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
        source = data.draw(strided(shape, stored, is_target=False))
        target = data.draw(strided(shape, wanted, is_target=True))
        expected.append(source.to(wanted, copy=True))
        targets.append(target)
        # Overwrite each part as soon as it is released: it must not be read later.
        copier.copy(source, target, lambda part: part.fill_(111))
        assert (source == 111).all()
    copier.close()
    assert not device.queue
    for target, numbers in zip(targets, expected, strict=True):
        assert torch.equal(target, numbers)


def test_what_surrounds_the_target_stays():
    whole = torch.zeros(10, 12)
    copier = PinnedCopier(host_buffers(64), DelayedDevice().submit)
    copier.copy(torch.ones(6, 5), whole[2:8, 3:8])
    copier.close()
    assert whole.sum() == whole[2:8, 3:8].sum() == 30


def test_a_buffer_is_waited_for_and_the_other_is_filled():
    device = DelayedDevice()
    copier = PinnedCopier(host_buffers(16), device.submit)
    targets = [torch.zeros(8), torch.zeros(4)]
    copier.copy(torch.arange(8.0), targets[0])
    copier.copy(torch.arange(4.0), targets[1])  # its buffer is still in use
    copier.close()
    submits = [("submit", 0), ("submit", 1), ("wait", 0), ("submit", 2)]
    assert device.log[:4] == submits
    assert {number for kind, number in device.log[4:] if kind == "wait"} == {1, 2}
    assert torch.equal(targets[0], torch.arange(8.0)) and torch.equal(targets[1], torch.arange(4.0))


def test_the_delayed_device_would_notice_a_missing_wait(monkeypatch):
    monkeypatch.setattr(PinnedCopier, "_free_buffer", lambda copier: copier.buffers[copier.turn])
    copier = PinnedCopier(host_buffers(16), DelayedDevice().submit)
    target = torch.zeros(32)
    copier.copy(torch.arange(32.0), target)
    copier.close()
    assert not torch.equal(target, torch.arange(32.0))


# ---- whole folders


def load(folder: Path, **options: object) -> Transformer:
    opened = open_folder(folder)
    return load_model(opened, opened.read_args(), **options)


def numbers(model: Transformer) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("form", ["1 shard", "4 shards", "tied", "hf", "int8", "int4"])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("share", [Share(), Share(1, 2), Share(0, 2, 1, 2)], ids=["1", "1/2", "1/4"])
def test_loading_through_buffers_gives_the_same_model(tmp_path, form, quantize, share):
    is_quantized = form.startswith("int")
    if is_quantized and quantize:
        pytest.skip("a quantized folder is not quantized again")
    shards = 4 if form == "4 shards" else 1
    path = tmp_path / "meta"
    folder = make_random_checkpoint(
        path, SMALL, shards=shards, tied=form == "tied", tokenizer=byte_tokenizer(tmp_path / "t.model")
    )
    if form == "hf":
        folder = to_hugging_face(folder, tmp_path / "hf", max_shard_bytes=200_000)
    if is_quantized:
        scheme = Scheme.parse(f"{form}:group=32" if form == "int4" else form)
        folder = quantize_folder(folder, tmp_path / "quantized", scheme, calibrate=False)
    options = {"dtype": torch.float16, "share": share, "quantize": quantize and SCHEMES[quantize]}
    expected = numbers(load(folder, **options))
    with loading_through(4096, at_once=is_quantized or quantize is not None) as device:
        found = numbers(load(folder, **options))
    assert device.submitted > 20 or quantize
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if not tensor.is_meta:
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# ---- without pinned memory


@pytest.mark.parametrize("device", ["cpu", torch.device("meta"), "mps"])
def test_other_devices_have_no_copier(device):
    with pinned_copier(device) as copier:
        assert copier is None


def test_without_pinned_memory_tensors_are_copied_plainly(monkeypatch):
    def refuse(*_: object, **options: object) -> Tensor:
        assert options["pin_memory"]
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", refuse)
    with pinned_copier("cuda:0") as copier:
        assert copier is None


# ---- host memory

LARGE = PARAMS | {"dim": 1024, "n_layers": 3, "n_heads": 16, "multiple_of": 256}
# Targets are on the meta device, to measure only the host memory of a load onto a GPU.
MEASURE = textwrap.dedent("""
    import sys
    from pathlib import Path
    import torch
    from delayed_device import loading_through
    from llama_ref.checkpoint.folder import open_folder
    from llama_ref.checkpoint.loading.loader import load_model
    from llama_ref.quantization import rounding

    rounding.BLOCK_WEIGHTS["meta"] = rounding.BLOCK_WEIGHTS["cuda"]

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    def load(path):
        folder = open_folder(path)
        with loading_through(1 << 20) as device:
            load_model(folder, folder.read_args(), device="meta", quantize=sys.argv[3] or None)
        return device.submitted

    load(sys.argv[1])  # the libraries' first use
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = status("VmRSS")
    print(load(sys.argv[2]), status("VmHWM") - before)
""")


@pytest.fixture(scope="module")
def in_memory() -> Iterator[Path]:
    """A large and a tiny folder in memory; on disk, a page fault would map up to 2 MB around it."""
    folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=folder) as path:
        tiny_folder(Path(path) / "tiny")
        make_random_checkpoint(Path(path) / "1 shard", LARGE, tokenizer=byte_tokenizer(Path(path) / "t.model"))
        yield Path(path)


@on_linux
@pytest.mark.parametrize(("form", "quantize"), [("2 shards", ""), ("1 shard", "int4"), ("hf", ""), ("int4", "")])
def test_loading_onto_a_gpu_holds_little_of_the_file_in_host_memory(warm, in_memory, form, quantize):
    tiny, large = in_memory / "tiny", in_memory / "1 shard"
    if form == "2 shards":
        large = to_meta(large, in_memory / "2 shards", shards=2)
    elif form == "hf":
        large = to_hugging_face(large, in_memory / "hf")
    elif form == "int4":
        large = quantize_folder(large, in_memory / "int4", Scheme.parse("int4"), calibrate=False)
    n_bytes = sum(path.stat().st_size for path in open_folder(large).shards)
    assert n_bytes > (65 << 20) * (0.25 if form == "int4" else 1)
    command = [warm / "python", "-c", MEASURE, tiny, large, quantize]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests")  # where delayed_device is
    assert done.returncode == 0, done.stderr
    copies, taken = map(int, done.stdout.split())
    assert copies > n_bytes >> 20
    assert taken < 12 << 20  # two buffers of 1 MB, and from "hf" one wq of 2 MB, twice
