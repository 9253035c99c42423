"""Results of a CUDA device, compared with the CPU and plain arithmetic.

Small models, a few seconds. In float32 the same tokens are expected: PyTorch keeps TF32 off for
matrix products unless asked. In bfloat16 and float16 two devices round differently, so there the
bound is the rounding error of the CPU itself. Models are shared by the tests, because compiling
takes longer than everything else.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from folders import tiny_folder
from llama_ref.args import ModelArgs
from llama_ref.bench.runner import compare
from llama_ref.bench.settings import Settings
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.loading import to_device
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.compiled.caches import new_cache
from llama_ref.compiled.cpu import compile_decode
from llama_ref.compiled.cuda_ops import linear, norm_swiglu
from llama_ref.decoding.loop import prefill, steps
from llama_ref.decoding.prompt_lookup import PromptLookup
from llama_ref.decoding.row import Row
from llama_ref.device import choose_dtype
from llama_ref.generation import Llama
from llama_ref.model import RMSNorm, Transformer
from llama_ref.quantization.apply import quantize_model, use_fast_kernels
from llama_ref.quantization.fp8 import Fp8Linear
from llama_ref.quantization.linear import Int4Linear, Int8Linear
from llama_ref.sampling import Sampler, SamplingParams
from llama_ref.session import Session
from llama_ref.study import patch, scale, trace
from random_models import as_int4_release, random_model
from vision_folders import noise, vision_folder

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ARGS = ModelArgs.from_dict(
    {"dim": 256, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 500, "multiple_of": 128, "norm_eps": 1e-5}
    | {"rope_theta": 500000.0, "use_scaled_rope": True}
)
GREEDY = SamplingParams(temperature=0)
LENGTHS = [[1], [300], [1100], [5, 1, 260, 40]]  # tokens of each row's prompt: across blocks, windows and prefill pieces
EAGER_AND_COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
HALF = choose_dtype(None, DEVICE) if torch.cuda.is_available() else torch.bfloat16  # bfloat16, or float16 before Ampere


def random_ids(n: int, seed: int) -> list[int]:
    return torch.randint(ARGS.vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def prompts_of(lengths: list[int]) -> list[list[int]]:
    return [random_ids(n, seed) for seed, n in enumerate(lengths)]


@cache
def made(
    dtype: torch.dtype, device: torch.device | str = DEVICE, *, compiled: bool = False, scheme: str | None = None
) -> Transformer:
    model = random_model(ARGS, seed=0).to(device, dtype)
    if scheme:
        quantize_model(model, scheme)
    if compiled:
        compile_decode(model)
    use_fast_kernels(model)
    return model


def exact_copy(dtype: torch.dtype, scheme: str | None = None) -> Transformer:
    """A float32 model on the CPU with the values of a `dtype` model or its quantized matrices."""
    rounded = random_model(ARGS, seed=0).to(DEVICE, dtype)
    if scheme:
        quantize_model(rounded, scheme)
    exact = random_model(ARGS, seed=0)
    for name, parameter in exact.named_parameters():
        module = rounded.get_submodule(name.removesuffix(".weight"))
        parameter.copy_(module.dequantize() if scheme and "norm" not in name else module.weight)
    return exact


def generated(model: Transformer, prompts: list[list[int]], n: int, params: SamplingParams = GREEDY) -> list[Row]:
    """Rows after n tokens or fewer; the draws depend only on the parameters' seed."""
    rows = [Row(prompt, n - i) for i, prompt in enumerate(prompts)]
    generator = torch.Generator().manual_seed(params.seed or 0)
    sampler = Sampler(params, generator, prompts, ARGS.vocab_size, model.norm.weight.device)
    for _ in steps(model, rows, sampler, stop_tokens=(), prompt_logprobs=True):
        pass
    return rows


def forced_logits(model: Transformer, prompts: list[list[int]], following: list[list[int]]) -> Tensor:
    """Logits (B, T, V) after each prompt and each of the next T - 1 tokens, step by step."""
    device = model.norm.weight.device
    cache = new_cache(model, len(prompts), max(map(len, prompts)) + len(following[0]))
    rows = [Row(prompt, len(following[0]) + 1) for prompt in prompts]
    with torch.inference_mode():
        logits = [prefill(model, rows, cache, False)]
        for tokens in torch.tensor(following, device=device).split(1, dim=1):
            logits.append(model(tokens, cache)[:, -1])
    return torch.stack(logits, dim=1).float().cpu()


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert not found.isnan().any()
    return float((found.float() - expected.float()).norm() / expected.float().norm())


# ---- the model


@EAGER_AND_COMPILED
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_float32_text_is_the_cpus(lengths, compiled):
    prompts = prompts_of(lengths)
    expected = generated(made(torch.float32, "cpu"), prompts, 40)
    model = made(torch.float32, compiled=compiled)
    for _ in range(2):  # a second call may find buffers and recordings of the first
        for row, other in zip(generated(model, prompts, 40), expected, strict=True):
            assert row.generated == other.generated
            torch.testing.assert_close(torch.tensor(row.logprobs), torch.tensor(other.logprobs), atol=2e-3, rtol=0)
            torch.testing.assert_close(
                torch.tensor(row.prompt_logprobs), torch.tensor(other.prompt_logprobs), atol=2e-3, rtol=0
            )


@EAGER_AND_COMPILED
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_half_precision_is_as_exact_as_on_the_cpu(lengths, compiled):
    """Each step's logits are as close to exact ones as the CPU's in the same dtype."""
    prompts = prompts_of(lengths)
    following = [random_ids(12, 100 + i) for i in range(len(prompts))]
    exact = forced_logits(exact_copy(HALF), prompts, following)
    of_cpu = relative_error(forced_logits(made(HALF, "cpu"), prompts, following), exact)
    of_cuda = relative_error(forced_logits(made(HALF, compiled=compiled), prompts, following), exact)
    assert of_cuda < 2 * of_cpu


@pytest.mark.parametrize("params", [SamplingParams(0.8, seed=7), SamplingParams(1.2, 0.95, 50, 0.01, 1.2, seed=3)], ids=str)
@EAGER_AND_COMPILED
def test_a_seed_gives_the_cpus_text(params, compiled):
    prompts = prompts_of([5, 1, 260])
    expected = generated(made(torch.float32, "cpu"), prompts, 40, params)
    found = generated(made(torch.float32, compiled=compiled), prompts, 40, params)
    assert [row.generated for row in found] == [row.generated for row in expected]


def test_other_prompts_after_the_first_compile_nothing():
    model = made(HALF, compiled=True)
    generated(model, prompts_of([300]), 40)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (1, 217, 500, 1100):
            generated(model, prompts_of([n]), 40)


# ---- fewer bits


@pytest.mark.parametrize("rows", [1, 2, 8, 33, 64, 300])
@pytest.mark.parametrize("shape", [(512, 256), (1000, 768), (256, 4096)], ids=str)
@pytest.mark.parametrize("dtype", dict.fromkeys((HALF, torch.float16)), ids=str)
@pytest.mark.parametrize(
    "quantized",
    [Int8Linear.from_weight, *(lambda weight, group=group: Int4Linear.from_weight(weight, group) for group in (32, 128, 256))],
    ids=["int8", "int4_32", "int4_128", "int4_256"],
)
def test_quantized_products_are_those_of_the_dequantized_matrix(quantized: Callable, dtype, shape, rows):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(shape, generator=generator) * shape[1] ** -0.5
    holder = torch.nn.Module()
    holder.matrix = quantized(weight.to(DEVICE, dtype))
    exact = holder.matrix.dequantize()
    holder.norm = torch.nn.Parameter(torch.ones(1, dtype=dtype, device=DEVICE))
    use_fast_kernels(holder, dtype)
    x = torch.randn(rows, shape[1], generator=generator).to(DEVICE, dtype)
    with torch.inference_mode():
        found = holder.matrix(x)
    assert found.dtype == dtype
    assert relative_error(found, F.linear(x.float(), exact)) < (6e-3 if dtype == torch.bfloat16 else 2e-3)
    assert relative_error(exact.cpu(), weight) < (0.02 if isinstance(holder.matrix, Int8Linear) else 0.15)


@EAGER_AND_COMPILED
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("lengths", [[300], [5, 1, 260, 40]], ids=str)
def test_a_quantized_model_computes_with_its_dequantized_weights(lengths, scheme, compiled):
    prompts = prompts_of(lengths)
    following = [random_ids(12, 100 + i) for i in range(len(prompts))]
    plain = exact_copy(HALF, scheme)
    exact = forced_logits(plain, prompts, following)
    of_cpu = relative_error(forced_logits(plain.to(HALF), prompts, following), exact)
    model = made(HALF, compiled=compiled, scheme=scheme)
    assert relative_error(forced_logits(model, prompts, following), exact) < 2 * of_cpu


# ---- folders, conversations, speculation


@pytest.mark.parametrize("release", [{"rotates": True}, {"rank": 4}, {"rotates": True, "rounds_inputs": False}], ids=str)
@EAGER_AND_COMPILED
def test_metas_int4_releases_compute_what_they_do_on_the_cpu(release, compiled):
    args = replace(ARGS, hidden_dim=1024)
    models = [random_model(args, seed=0) for _ in range(2)]
    for model in models:
        torch.manual_seed(0)
        as_int4_release(model, **release)
    models[1].to(DEVICE)
    if compiled:
        compile_decode(models[1])
    prompts, following = prompts_of([5, 1, 260, 40]), [random_ids(12, 100 + i) for i in range(4)]
    expected, found = (forced_logits(model, prompts, following) for model in models)
    # Another order of summation may round an input to the next step.
    assert relative_error(found.cpu(), expected) < (0.02 if release.get("rounds_inputs", True) else 1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [2, 17, 64])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(
    "quantized", [Int8Linear.from_weight, partial(Int4Linear.from_weight, group=32), partial(Int4Linear.from_weight, group=128)]
)
def test_products_of_rows_are_fused_with_what_comes_after(quantized: Callable, dtype, rows):
    torch.manual_seed(rows)
    matrix = quantized(torch.randn(1000, 640) * 640**-0.5)
    if isinstance(matrix, Int4Linear):
        matrix.scale, matrix.zero = matrix.scale.to(dtype), matrix.zero.to(dtype)
    exact = matrix.dequantize().double()
    matrix, x, add = matrix.to(DEVICE), torch.randn(rows, 640, dtype=dtype), torch.randn(rows, 1000, dtype=dtype)
    norm = RMSNorm(640, 1e-5).to(DEVICE, dtype)
    y = x.double() @ exact.T
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3
    assert relative_error(linear(x.to(DEVICE), matrix, add=add.to(DEVICE)).cpu(), y + add) < tolerance
    gate, up = (F.rms_norm(x.double(), (640,), eps=1e-5) @ exact.T).chunk(2, dim=-1)
    assert relative_error(norm_swiglu(x.to(DEVICE), norm, matrix).cpu(), F.silu(gate) * up) < tolerance


@pytest.mark.parametrize("rows", [1, 8, 300])
@pytest.mark.parametrize("rounds_inputs", [True, False])
def test_fp8_products_are_those_of_the_cpu(rows, rounds_inputs):
    """With `torch._scaled_mm` if the card multiplies float8, else by converting it."""
    generator = torch.Generator().manual_seed(rows)
    q = torch.randn(512, 256, generator=generator).mul(40).to(torch.float8_e4m3fn)
    scale, x = torch.rand(512, generator=generator) * 1e-2, torch.randn(rows, 256, generator=generator).to(HALF)
    exact = Fp8Linear(q, scale, rounds_inputs=rounds_inputs)(x.float())
    found = Fp8Linear(q.to(DEVICE), scale.to(DEVICE), rounds_inputs=rounds_inputs)(x.to(DEVICE))
    assert relative_error(found.cpu().float(), exact) < 0.02


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("cuda") / "tiny")


@pytest.mark.parametrize("scheme", [None, "int8", "int4:group=32"])
def test_loading_puts_the_same_numbers_on_the_card(folder, scheme):
    args = open_folder(folder).read_args()
    on_cpu, on_cuda = (
        load_model(open_folder(folder), args, device=device, dtype=torch.float32, quantize=scheme) for device in ("cpu", DEVICE)
    )
    expected, found = on_cpu.state_dict(), on_cuda.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in found.items():
        assert tensor.device.type == DEVICE.type
        assert tensor.cpu().equal(expected[name]), name


@cache
def built(folder: Path, device: torch.device | str, *, compiled: bool = False) -> Llama:
    options = {"dtype": "float32", "max_seq_len": 512, "verify": "never"}
    return Llama.build(folder, device=device, compile=compiled, **options)


@EAGER_AND_COMPILED
def test_conversations_and_seeds_give_the_cpus_text(folder, compiled):
    on_cpu, on_cuda = built(folder, "cpu"), built(folder, DEVICE, compiled=compiled)
    for sampling in ({"temperature": 0}, {"temperature": 0.7, "top_p": 0.9, "seed": 5}):
        sessions = Session(on_cpu, "Hi"), Session(on_cuda, "Hi")
        for text in ("one", "two"):
            expected, found = ("".join(session.say(text, max_gen_len=20, **sampling)) for session in sessions)
            assert found == expected
    prompts = [[1, 2, 3] * 30, [4, 5]]
    assert on_cuda.generate(prompts, 30, seed=11) == on_cpu.generate(prompts, 30, seed=11)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory) -> Path:
    return vision_folder(tmp_path_factory.mktemp("cuda") / "seeing")


@EAGER_AND_COMPILED
def test_text_about_images_is_the_cpus(seeing, compiled):
    prompts, images = ["A", "BC", "no image"], [[noise(90, 40)], [noise(50, 50, 1), noise(112, 60, 2)], []]
    options = {"images": images, "temperature": 0, "max_gen_len": 24, "logprobs": True}
    expected = built(seeing, "cpu").text_completion(prompts, **options)
    for _ in range(2):
        found = built(seeing, DEVICE, compiled=compiled).text_completion(prompts, **options)
        for row, other in zip(found, expected, strict=True):
            assert row["generation"] == other["generation"]
            torch.testing.assert_close(torch.tensor(row["logprobs"]), torch.tensor(other["logprobs"]), atol=2e-3, rtol=0)


@EAGER_AND_COMPILED
def test_guessed_text_is_the_cpus(folder, compiled):
    plain, on_cuda = built(folder, "cpu"), built(folder, DEVICE, compiled=compiled)
    guessing = Llama(on_cuda.model, on_cuda.tokenizer, max_seq_len=512, speculation=PromptLookup())
    prompts = [[1, 2, 3] * 30, [4, 5]]
    assert guessing.generate(prompts, 60, temperature=0) == plain.generate(prompts, 60, temperature=0)


def test_our_own_figures(folder):
    sizes = {"prompt_len": 16, "gen_len": 4, "batch": "1", "rounds": 1, "threads": 1}
    found = compare(Settings.parse(str(folder), device="cuda", dtype=str(HALF).removeprefix("torch."), **sizes))
    assert found.results[0].peak_bytes > 0
    assert found.bandwidth.median > 0


# ---- study


def test_a_trace_holds_the_cpus_values():
    ids = [random_ids(40, 1), random_ids(40, 2)]
    expected, found = (trace(made(torch.float32, device), ids, "*") for device in ("cpu", DEVICE))
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].cpu(), value, atol=2e-3, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


@EAGER_AND_COMPILED
def test_looking_and_patching_leave_no_trace(compiled):
    model = made(torch.float32, compiled=compiled)
    ids = torch.tensor([random_ids(40, 1)], device=DEVICE)
    with torch.inference_mode():
        before = model(ids)
        seen = trace(model, ids, "*")
        with patch(model, {"layers.1.attention.output": scale(0)}):
            patched = model(ids)
        after = model(ids)
    assert seen["logits"].equal(before)
    assert after.equal(before)
    assert not torch.isclose(patched, before).all()


# ---- loading


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tensors_arrive_through_pinned_buffers(monkeypatch, wanted):
    monkeypatch.setattr(to_device, "BUFFER_BYTES", 1 << 16)
    sources = [torch.randint(-100, 100, (n, 300)).to(torch.bfloat16) for n in (1, 700, 1300)]
    targets = [torch.zeros(len(source), 600, dtype=wanted, device=DEVICE) for source in sources]
    with to_device.pinned_copier(DEVICE) as copier:
        assert copier and all(buffer.is_pinned() for buffer in copier.buffers)
        for source, target in zip(sources, targets, strict=True):
            copier.copy(source, target[:, 100:400])
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(target[:, 100:400].cpu(), source.to(wanted))
        assert not target[:, :100].any() and not target[:, 400:].any()
