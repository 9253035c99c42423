"""The device and precision chosen on other machines: torch's answers about hardware are faked."""

import pytest
import torch
from torch.torch_version import TorchVersion

from llama_ref.device import MPS_RIGHT_SINCE, choose_device, choose_dtype
from llama_ref.errors import RequestError

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.fixture
def machine(monkeypatch):
    """Fake a machine with CUDA devices, perhaps MPS, that computes or only emulates bfloat16."""

    def pretend(cuda: int = 0, mps: bool = False, bfloat16: bool = True, version: str = MPS_RIGHT_SINCE) -> None:
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if bfloat16 else (7, 5))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: bfloat16 or (major, minor) < (14, 0))

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return pretend


@pytest.mark.parametrize(
    ("cuda", "mps", "local_rank", "chosen"),
    [
        (0, False, None, "cpu"),
        (0, False, "1", "cpu"),
        (0, True, None, "mps"),
        (1, False, None, "cuda:0"),
        (2, True, None, "cuda:0"),
        (8, False, "7", "cuda:7"),
    ],
)
def test_without_a_wish_the_best_device_is_taken(machine, monkeypatch, cuda, mps, local_rank, chosen):
    machine(cuda, mps)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert choose_device() == choose_device(None) == torch.device(chosen)


@pytest.mark.parametrize(
    ("version", "chosen"), [("2.8.0", "cpu"), ("2.9.1+cpu", "cpu"), ("2.12.0", "mps"), ("2.13.0+cpu", "mps")]
)
def test_mps_is_taken_where_this_pytorch_computes_right_on_it(machine, version, chosen):
    machine(mps=True, version=version)
    assert choose_device() == torch.device(chosen)
    assert choose_device("mps") == MPS


def test_this_very_machine_gets_a_device_that_computes():
    assert torch.ones(2, device=choose_device()).sum() == 2


@pytest.mark.parametrize("wish", ["cpu", "cuda", "cuda:1", "mps", CPU, CUDA, MPS])
def test_a_wish_is_granted_where_it_can_be(machine, wish):
    machine(cuda=2, mps=True)
    assert choose_device(wish) == torch.device("cuda:0" if str(wish) == "cuda" else wish)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ("cuda", "device cuda is not available here; leave it out to use one that is"),
        ("cuda:0", "device cuda:0 is not available here"),
        (CUDA, "device cuda is not available here"),
        ("mps", "device mps is not available here"),
        *(
            (stranger, f"device {stranger} is not supported, expected cuda, mps or cpu")
            for stranger in ("xpu", "meta", "hpu:1")
        ),
        ("cdua", "unknown device cdua, expected cuda, mps or cpu; did you mean cuda?"),
        *(
            (nonsense, f"unknown device {nonsense}, expected cuda, mps or cpu")
            for nonsense in ("gpu", "cuda:x", "CPU", "", 1.5)
        ),
    ],
)
def test_a_device_that_is_not_there_is_refused(machine, wish, says):
    machine()
    with pytest.raises(RequestError) as error:
        choose_device(wish)
    assert says in str(error.value)


@pytest.mark.parametrize(("wish", "local_rank"), [("cuda:2", "0"), (None, "2")])
def test_a_cuda_device_beyond_the_last_is_refused(machine, monkeypatch, wish, local_rank):
    machine(cuda=2)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(RequestError, match="no device cuda:2: this machine has 2 CUDA device"):
        choose_device(wish)


def test_a_local_rank_that_is_no_number_is_refused(machine, monkeypatch):
    machine(cuda=2)
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(RequestError, match="unknown device cuda:first"):
        choose_device()


@pytest.mark.parametrize("device", [CPU, CUDA, MPS])
@pytest.mark.parametrize("bfloat16", [True, False])
def test_without_a_wish_bfloat16_is_taken_where_the_device_computes_in_it(machine, device, bfloat16):
    """Emulation does not count: a T4 (7.5) only emulates bfloat16."""
    machine(cuda=1, mps=True, bfloat16=bfloat16)
    assert choose_dtype(None, device) == (torch.bfloat16 if bfloat16 or device == CPU else torch.float16)


@pytest.mark.parametrize(
    ("wish", "dtype"),
    [
        *((name, torch.bfloat16) for name in ("bfloat16", "bf16", torch.bfloat16)),
        *((name, torch.float16) for name in ("float16", "fp16", "half", torch.float16)),
        *((name, torch.float32) for name in ("float32", "fp32", "float", torch.float32)),
    ],
)
def test_a_dtype_goes_by_its_names(machine, wish, dtype):
    machine(cuda=1, bfloat16=False)
    assert choose_dtype(wish, CPU) == choose_dtype(wish, CUDA) == dtype


@pytest.mark.parametrize("wish", ["int8", "float64", "bfloat", "", torch.float64, torch.int8, 16, []])
def test_a_dtype_that_is_not_computed_in_is_refused(wish):
    with pytest.raises(RequestError) as error:
        choose_dtype(wish, CPU)
    assert f"dtype {wish} is not one of bfloat16, float16, float32" == str(error.value)
