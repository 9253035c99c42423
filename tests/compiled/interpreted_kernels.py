"""The Triton kernels' arithmetic, in Triton's interpreter on a CPU.

test_on_cuda.py runs the kernels themselves. test_triton.py runs this file in a separate process.
The interpreter has no bfloat16 products: float16 stands for both.
"""

import random
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ref.compiled import cuda_ops
from llama_ref.model import RMSNorm
from llama_ref.quantization.linear import Int4Linear, Int8Linear

SEEDS = range(4)  # the interpreter is slow
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def kernels() -> Iterator[SimpleNamespace]:
    """The modules, imported for the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        from triton import language
        from triton.runtime import interpreter

        from llama_ref.compiled.triton import attention as triton_attention
        from llama_ref.compiled.triton import elementwise as triton_elementwise
        from llama_ref.compiled.triton import products as triton_products

        if hasattr(interpreter, "_LangPatchScope"):
            # The functions that kernels call are already patched. Searching for more takes a third
            # of the time.
            patch_lang, nothing = interpreter._patch_lang, interpreter._LangPatchScope

            def once(fn):
                used = [each for each in (language, language.core) if any(each is value for value in fn.__globals__.values())]
                return patch_lang(fn) if any(language.core.is_builtin(each.load) for each in used) else nothing()

            patch.setattr(interpreter, "_patch_lang", once)
        yield SimpleNamespace(attention=triton_attention, elementwise=triton_elementwise, products=triton_products)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < TOLERANCE[dtype]


def matrix(kind: str, N: int, K: int, dtype: torch.dtype, group: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """`matvec`'s arguments, and the float64 matrix that they represent."""
    weight = torch.randn(N, K) * K**-0.5
    if kind == "int8":
        module = Int8Linear.from_weight(weight)
        return (module.q, module.scale), module.dequantize().double()
    if kind == "int4 of Meta's":  # float32 scales and no zero points
        module = Int4Linear(torch.randint(256, (N, K // 2), dtype=torch.uint8), torch.rand(N, K // group) * K**-0.5)
        return (module.packed, module.scale), module.dequantize().double()
    if kind == "int4":
        module = Int4Linear.from_weight(weight, group)
        return (module.packed, module.scale, module.zero), module.dequantize().double()
    weight = weight.to(dtype)
    return (weight,), weight.double()


def dtypes(seed: int) -> torch.dtype:
    return (torch.float32, torch.float16)[seed % 2]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["plain", "int8", "int4", "int4 of Meta's"])
def test_a_row_times_a_matrix_with_what_stands_around_it(kernels, kind, seed):
    torch.manual_seed(seed)
    draw, dtype = random.Random(seed), dtypes(seed)
    group = draw.choice([32, 64, 128])
    K = group * draw.randint(1, 4)
    head_dim, n_heads, n_kv_heads = draw.choice([(8, 4, 2), (24, 2, 1), (48, 1, 1)])
    gain = torch.rand(K).add(0.5).to(dtype) if draw.random() < 0.5 else None
    x = torch.randn(K).to(dtype)
    normed = x.double()
    if gain is not None:
        normed = normed * torch.rsqrt(normed.square().mean() + 1e-5) * gain.double()
    options = {"gain": gain, "eps": 1e-5}

    tensors, exact = matrix(kind, 2 * draw.randint(1, 10), K, dtype, group)
    y = exact @ normed
    assert_near(kernels.products.matvec(x, *tensors, **options), y, dtype)
    residual = torch.randn(len(y)).to(dtype)
    assert_near(kernels.products.matvec(x, *tensors, residual=residual, **options), y + residual, dtype)
    gate, up = y.chunk(2)
    assert_near(kernels.products.matvec(x, *tensors, gated=True, **options), F.silu(gate) * up, dtype)

    tensors, exact = matrix(kind, (n_heads + 2 * n_kv_heads) * head_dim, K, dtype, group)
    y = (exact @ normed).view(-1, head_dim)
    q, k, v = y.split([n_heads, n_kv_heads, n_kv_heads])
    angles = torch.rand(9, head_dim // 2) * 6
    place = draw.randrange(9)
    cos, sin = angles[place].cos().double(), angles[place].sin().double()
    # Heads within tokens.
    cache = torch.zeros(2, 9, n_kv_heads, head_dim, dtype=dtype).transpose(1, 2)
    rope = angles.cos(), angles.sin(), *cache, torch.tensor([place])
    assert_near(kernels.products.matvec(x, *tensors, rope=rope, **options), turned(q, cos, sin).flatten(), dtype)
    assert_near(cache[0][:, place], turned(k, cos, sin), dtype)
    assert_near(cache[1][:, place], v, dtype)
    assert cache.count_nonzero() <= 2 * n_kv_heads * head_dim, "nothing else is written"


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["int8", "int4", "int4 of Meta's"])
def test_rows_times_a_quantized_matrix(kernels, kind, seed):
    torch.manual_seed(seed)
    draw, dtype = random.Random(seed), dtypes(seed)
    group = draw.choice([32, 128])
    K = group * draw.randint(1, 5)
    tensors, exact = matrix(kind, 8 * draw.randint(1, 8), K, dtype, group)
    zero = tensors[2] if kind == "int4" else None
    assert_near(kernels.products.dequantize(*tensors[:2], zero, torch.float32), exact, torch.float32)
    for rows in (1, draw.randint(2, 20), 65):
        x = torch.randn(rows, K).to(dtype)
        y = x.double() @ exact.T
        assert_near(kernels.products.product(x, *tensors), y, dtype)
        if 1 < rows <= kernels.products.MOST_ROWS:
            gate, up = y.chunk(2, dim=-1)
            assert_near(kernels.products.matmul(x, *tensors, gated=True), F.silu(gate) * up, dtype)
            residual = torch.randn(y.shape).to(dtype)
            for split in (1, 3):
                found = kernels.products.matmul(x, *tensors, residual=residual, config=(16, 64, 4, split, 2))
                assert_near(found, y + residual, dtype)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_tokens_attention(kernels, seed, monkeypatch):
    """Over exactly the whole row, however many programs share it."""
    torch.manual_seed(seed)
    draw, dtype = random.Random(seed), dtypes(seed)
    monkeypatch.setattr(kernels.attention, "PROGRAMS", draw.choice([1, 16, 528]))
    monkeypatch.setattr(kernels.attention, "has_tensor_cores", lambda device: seed < 2)
    B, K, G = draw.choice([1, 3]), draw.choice([1, 2]), draw.choice([1, 3, 4])
    hd, S = draw.choice([16, 64]), draw.choice([5, 600])
    lengths = torch.randint(S, (B,))
    cache = torch.randn(2, B, S, K, hd).to(dtype)
    for row, length in enumerate(lengths.tolist()):
        cache[:, row, length + 1 :] = torch.nan
    keys, values = cache.transpose(2, 3) if draw.random() < 0.5 else cache.transpose(2, 3).contiguous()
    q = torch.randn(B, K * G, hd).to(dtype)
    found = kernels.attention.attend_one(q, keys, values, lengths)
    for row, length in enumerate(lengths.tolist()):
        k, v = (x[row, :, : length + 1].double().repeat_interleave(G, dim=0) for x in (keys, values))
        expected = F.scaled_dot_product_attention(q[row, :, None].double(), k, v)[:, 0]
        assert_near(found[row], expected, dtype)


@torch.inference_mode()
def test_kernels_between_the_products_are_the_models_lines(kernels):
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16):
        norm = RMSNorm(96, 1e-5).to(dtype)
        norm.weight.data.uniform_(0.5, 1.5)
        x = torch.randn(5, 96).to(dtype)
        assert_near(kernels.elementwise.rms_norm(x, norm.weight, norm.eps), norm(x), dtype)
        gate, up = x.chunk(2, dim=-1)
        assert_near(kernels.elementwise.silu_mul(x), F.silu(gate) * up, dtype)
        for B, T, H, K, hd in ((1, 4, 6, 2, 16), (3, 2, 4, 4, 24)):
            matrix = torch.nn.Linear(96, (H + 2 * K) * hd, bias=False).to(dtype).requires_grad_(False)
            x = torch.randn(B * T, 96).to(dtype)
            positions = (torch.arange(B)[:, None] + torch.arange(T)).flatten()
            angles = torch.rand(9, hd // 2) * 6
            caches = torch.zeros(2, 2, B, 9, K, hd, dtype=dtype).transpose(3, 4)
            args = positions, angles.cos(), angles.sin()
            expected = cuda_ops.norm_query(x, norm, matrix, *args, *caches[0])
            found = kernels.elementwise.rotate_and_store(matrix(norm(x)), *args, *caches[1], H)
            assert_near(found, expected, dtype)
            assert_near(caches[1], caches[0], dtype)


@pytest.mark.parametrize(("B", "V"), [(1, 5000), (3, 1000), (2, 1024), (5, 60)])
def test_a_row_of_logits_is_looked_over(kernels, B, V):
    torch.manual_seed(V)
    logits = torch.randn(B, V) * 5
    logits[0, : V // 2] = -torch.inf  # banned tokens
    logits[-1, V // 3] = logits[-1, V // 2] = 99.0  # the first of ties
    ids, normalizers = kernels.elementwise.row_stats(logits)
    assert ids.equal(logits.argmax(-1))
    torch.testing.assert_close(normalizers, logits.logsumexp(-1))
    logits[0, -1] = torch.nan
    assert kernels.elementwise.row_stats(logits)[1][0].isnan()
