"""Rounding in blocks of rows: the block size does not change the result, and limits the memory."""

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llama_ref.quantization import rounding


def rounded(weight: Tensor, group: int, importance: Tensor | None) -> list[Tensor]:
    int8, int4 = rounding.int8_scales(weight), rounding.int4_scales(weight, group, importance)
    return [int8, rounding.to_int8(weight, int8), *int4, rounding.to_int4(weight, *int4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_size_of_a_block_changes_no_number(monkeypatch, dtype, group, weighted):
    generator = torch.Generator().manual_seed(group)
    weight = torch.randn(300, 1024, generator=generator).to(dtype)
    importance = torch.rand(1024, generator=generator) if weighted else None
    expected = rounded(weight, group, importance)
    for n_weights in (1, 5 << 10, 1 << 17, 1 << 24):
        monkeypatch.setitem(rounding.BLOCK_WEIGHTS, "cpu", n_weights)
        for found, same in zip(rounded(weight, group, importance), expected, strict=True):
            assert torch.equal(found, same)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_the_size_of_a_block_changes_no_number_on_cuda(monkeypatch, group):
    weight = torch.randn(14336, 4096, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()
    expected = rounded(weight, group, None)
    for n_weights in (1 << 15, 1 << 22):
        monkeypatch.setitem(rounding.BLOCK_WEIGHTS, "cuda", n_weights)
        for found, same in zip(rounded(weight, group, None), expected, strict=True):
            assert torch.equal(found, same)


class LiveBytes(TorchDispatchMode):
    """The peak number of bytes of all tensors created in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_iter(args) if isinstance(x, Tensor)}
        for tensor in tree_iter(out):
            key = tensor.untyped_storage()._cdata if isinstance(tensor, Tensor) else None
            if key not in (None, *given, *self.live):
                self.live[key] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor.untyped_storage(), self.live.pop, key)
                self.peak = max(self.peak, sum(self.live.values()))
        return out


@pytest.mark.parametrize("group", [32, 128])
def test_a_block_takes_as_much_memory_as_is_said(monkeypatch, group):
    weight = torch.randn(256, 1024).bfloat16()
    monkeypatch.setitem(rounding.BLOCK_WEIGHTS, "cpu", weight.numel())
    with LiveBytes() as scales:
        found = rounding.int4_scales(weight, group)
    with LiveBytes() as weights:
        rounding.to_int4(weight, *found)
    assert 16 < scales.peak / weight.numel() <= 18
    assert weights.peak / weight.numel() <= 18
    assert 18 * rounding.BLOCK_WEIGHTS["cuda"] < 0.31e9
