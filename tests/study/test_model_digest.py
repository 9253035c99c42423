"""The digest of a model depends on every bit of its weights, and not on where they are."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llama_ref.model import Transformer
from llama_ref.quantization.fp8 import Fp8Linear
from llama_ref.quantization.linear import Int4Linear, Int8Linear
from llama_ref.study import model_digest
from llama_ref.study.model_digest import MULTIPLIER, weights_digest
from random_models import as_int4_release, grouped_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def model(dtype: torch.dtype = torch.float32) -> Transformer:
    return grouped_model(8, 2, 2).to(dtype)


def quantized() -> Transformer:
    """A model with packed int4, int8 and float8 matrices."""
    one = model(torch.bfloat16)
    w = one.layers[0].feed_forward
    w.w1, w.w2 = Int4Linear.from_weight(w.w1.weight, 32), Int8Linear.from_weight(w.w2.weight)
    q = w.w3.weight.to(torch.float8_e4m3fn)
    w.w3 = Fp8Linear(q, torch.ones(len(q)), rounds_inputs=False)
    return one


def flip(tensor: Tensor, place: int) -> None:
    """Flip the highest bit of one byte."""
    tensor.view(-1).view(torch.uint8)[place] ^= 128


@pytest.mark.parametrize("make", [*(lambda dtype=dtype: model(dtype) for dtype in DTYPES), quantized])
def test_one_changed_bit_changes_it(make):
    one = make()
    before, dtypes = weights_digest(one), set()
    for tensor in one.state_dict().values():
        dtypes.add(tensor.dtype)
        n_bytes = tensor.numel() * tensor.element_size()
        for place in {0, 1, n_bytes // 3, n_bytes - 1}:
            flip(tensor, place)
            assert weights_digest(one) != before
            flip(tensor, place)
    assert weights_digest(one) == before == weights_digest(make())
    assert make is not quantized or {torch.int8, torch.uint8, torch.float8_e4m3fn} <= dtypes


@pytest.mark.parametrize("columns", [1 << 6, 1 << 10, model_digest.COLUMNS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_changes_of_many_values_do_not_cancel(dtype, columns, monkeypatch):
    monkeypatch.setattr(model_digest, "COLUMNS", columns)
    one = model(dtype)
    weight = one.layers[1].feed_forward.w2.weight
    plain = weight.clone()
    changes: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "the signs of a column": lambda: weight[:, 3].neg_(),  # the highest bits of words
        "the signs of two values": lambda: weight[:2, 7].neg_(),
        "a column, doubled": lambda: weight[:, 5].mul_(2),
        "all signs": lambda: weight.neg_(),
        "rows in another order": lambda: weight.copy_(plain.flip(0)),
        "columns in another order": lambda: weight.copy_(plain.flip(1)),
        "rows, moved by one": lambda: weight.copy_(plain.roll(1, 0)),
        "zeros": lambda: weight.zero_(),
    }
    found = {}
    for what, change in changes.items():
        change()
        found[what] = weights_digest(one)
        weight.copy_(plain)
    assert len(set(found.values())) == len(changes), found
    assert weights_digest(one) == found["nothing"]


def test_the_sums_are_those_of_whole_numbers(monkeypatch):
    monkeypatch.setattr(model_digest, "COLUMNS", 8)
    values = torch.randint(-128, 128, (79,), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    data = bytes(values.view(torch.uint8).tolist()) + b"\0"
    words = [int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, 80, 4)]
    expected = [0] * 8
    for i, word in enumerate(words):
        expected[i % 8] = (MULTIPLIER * expected[i % 8] + word) % 2**64
    sums = torch.zeros(8, dtype=torch.int64)
    model_digest._add(sums, values)
    assert [total % 2**64 for total in sums.tolist()] == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (3, 7)])
def test_where_a_tensor_is_stored_does_not_matter(dtype, shape, monkeypatch):
    monkeypatch.setattr(model_digest, "COLUMNS", 4)
    wanted = (3 * torch.arange(torch.Size(shape).numel())).to(dtype).view(shape)
    stored = [torch.zeros(100, dtype=dtype)[offset : offset + wanted.numel()].view(shape) for offset in range(4)]
    stored.append(torch.zeros(shape[::-1], dtype=dtype).permute(list(reversed(range(len(shape))))))
    found = []
    for tensor in stored:
        found.append(torch.zeros(4, dtype=torch.int64))
        model_digest._add(found[-1], tensor.copy_(wanted))
    assert all(torch.equal(sums, found[0]) for sums in found)
    assert found[0].any() == (wanted.numel() > 1)


def test_constants_and_rounded_inputs_count():
    plain = grouped_model(8, 2, 2, scaled=False)
    others = [grouped_model(8, 2, 2, scaled=False, rope_theta=1e4), grouped_model(8, 2, 2, scaled=True)]
    assert len({weights_digest(one) for one in (plain, *others)}) == 3
    rounded, full = model(), model()
    as_int4_release(rounded)
    as_int4_release(full, rounds_inputs=False)
    assert weights_digest(rounded) != weights_digest(full)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("make", [model, quantized])
def test_it_is_equal_on_a_gpu(make):
    assert weights_digest(make().cuda()) == weights_digest(make())
