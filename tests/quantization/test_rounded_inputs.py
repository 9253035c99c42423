"""Inputs are rounded in the same way as in the programs that Meta's releases were made for."""

import pytest
import scipy.linalg
import torch
from torchao.quantization.utils import per_token_dynamic_quant

from llama_ref.quantization.hadamard import hadamard
from llama_ref.quantization.rounded_inputs import FP8_BOUND, FP8_LARGEST, round_to_fp8, round_to_int8

CASES = {
    "normal": lambda: torch.randn(400, 333),
    "all positive": lambda: torch.rand(50, 64) + 3,
    "all negative": lambda: -torch.rand(50, 64) - 3,
    "outliers": lambda: torch.randn(50, 512) * torch.rand(512).pow(8) * 1e4,
    "tiny": lambda: torch.randn(50, 64) * 1e-9,
    "zeros": lambda: torch.zeros(3, 8),
    "halves of steps": lambda: (torch.randint(-255, 256, (50, 64)) / 2).index_fill(1, torch.tensor([0]), 127.5),
}


@pytest.mark.parametrize("case", CASES)
def test_int8_is_torchaos_to_the_bit(case):
    torch.manual_seed(0)
    x = CASES[case]()
    n, step = round_to_int8(x)
    expected = per_token_dynamic_quant(x, eps=torch.finfo(torch.float32).eps)  # as torchao's linear layer calls it
    assert torch.equal(n * step, expected)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(n.to(dtype).float(), n), "the steps are exact in every dtype"


def test_fp8_is_bounded_and_never_infinite():
    x = torch.tensor([[0.0, 0.0], [3.0, -448.0], [5000.0, -1200.0], [1e-9, 0.0]])
    n, step = round_to_fp8(x)
    assert n.dtype == torch.float8_e4m3fn and n.float().isfinite().all()
    found = n.float() * step
    assert torch.equal(found[0], x[0])
    assert found[1].tolist() == [3.0, -448.0]
    assert found[2].tolist() == pytest.approx([FP8_BOUND, -FP8_BOUND]), "cut off"
    assert step[3].item() == pytest.approx(1 / (FP8_LARGEST * 512)), "no finer"


@pytest.mark.parametrize("n", [1, 2, 4, 32, 256, 8192])
def test_hadamard_is_sylvesters_and_its_own_inverse(n):
    torch.manual_seed(0)
    x = torch.randn(2, 3, n)
    expected = x.double() @ torch.from_numpy(scipy.linalg.hadamard(n, dtype="int8")).double() / n**0.5
    torch.testing.assert_close(hadamard(x).double(), expected, atol=3e-6, rtol=0)
    torch.testing.assert_close(hadamard(hadamard(x)), x, atol=3e-6, rtol=0)
    assert hadamard(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("n", [3, 12, 1536])
def test_other_widths_are_refused(n):
    with pytest.raises(ValueError, match="is not a power of two"):
        hadamard(torch.ones(n))
