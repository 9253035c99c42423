"""The compiled decode step gives the plain one's results, for full, int8 and int4 weights."""

import threading
import time

import pytest
import torch
import torch._inductor.cpu_vec_isa

import random_models
from llama_ref.args import ModelArgs
from llama_ref.compiled.caches import new_cache
from llama_ref.compiled.cpu import OPTIONS, _FastOutput, _rotate, compile_decode, matvec
from llama_ref.compiled.int4_layout import COLUMNS, PlanarInt4Linear, product
from llama_ref.compiled.int8_layout import PiecewiseInt8Linear
from llama_ref.decoding.loop import steps
from llama_ref.decoding.row import Row
from llama_ref.errors import RequestError
from llama_ref.generation import Llama
from llama_ref.machine.onednn import onednn_for
from llama_ref.model import Transformer, rotate
from llama_ref.parallel.tensor import RowParallelLinear
from llama_ref.quantization.apply import quantize_model
from llama_ref.quantization.linear import Int4Linear, Int8Linear
from random_models import as_int4_release

NEAR_TIE = 0.25  # two steps of bfloat16, where logits are around 20
ARGS = {"dim": 192, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "vocab_size": 320, "multiple_of": 1024}
ARGS |= {"norm_eps": 1e-5, "rope_theta": 500000.0, "ffn_dim_multiplier": 9.0, "use_scaled_rope": True}  # w2: rows of 5 pieces


@torch.inference_mode()
def random_model(dtype: torch.dtype, scheme: str | None = None) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelArgs.from_dict(ARGS)).to(dtype).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    if scheme:
        quantize_model(model, scheme)
    return model


def random_release(**options) -> Transformer:
    """A model with the matrices of Meta's int4 releases; the feed-forward width is a power of two."""
    model = random_models.random_model(ModelArgs.from_dict(ARGS | {"hidden_dim": 8192, "multiple_of": 8192}), seed=0)
    as_int4_release(model, **options)
    return model


def random_int4() -> Transformer:
    """Attention in our int4, the rest as in Meta's releases: each kind of matrix is compiled once.

    Inputs are not rounded: a difference in the last bit would move a number to the next step, and
    change all that follow.
    """
    model = random_release(rank=4, rotates=True, rounds_inputs=False)
    for block, ours in zip(model.layers, random_model(torch.float32, "int4").layers, strict=True):
        block.attention = ours.attention
    return model


@pytest.fixture
def fresh_compiler() -> None:
    """Forget what other tests compiled: a ninth variant of a function runs uncompiled."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def n_compiled() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def decoded(model: Transformer, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Logits (T, V) of each token after a prompt, one step at a time."""
    cache = new_cache(model, 1, len(prompt) + len(tokens))
    cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)  # as unwritten memory may be
    # Not the cache: a difference from decoding/loop.py would compile the step again.
    with torch.inference_mode():
        model(torch.tensor([prompt]), cache)
        with onednn_for(torch.tensor([tokens[:1]]), cache.keys.dtype):
            return torch.cat([model(torch.tensor([[token]]), cache)[0] for token in tokens])


@pytest.fixture(scope="module", params=[None, "int8", "int4"])
def plain_and_compiled(request) -> tuple[Transformer, Transformer]:
    """Two models with the same weights."""
    plain, fast = (random_int4() if request.param == "int4" else random_model(torch.float32, request.param) for _ in range(2))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compile_decode(fast)
    return plain, fast


def test_compiled_steps_give_the_plain_ones_logits(plain_and_compiled):
    plain, fast = plain_and_compiled
    assert "forward" in vars(fast.layers[0]), "nothing was put on"
    assert n_compiled() >= 2, "a layer and the output"
    assert not torch._dynamo.utils.counters["graph_break"], "a part runs uncompiled"
    # From one token in the cache to five blocks.
    for prompt in ([5], [5, 7], list(range(1, 40)), list(range(1, 312))):
        expected, found = (decoded(model, prompt, [3, 1, 4, 1, 5]) for model in (plain, fast))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert (found - expected).std() < 1e-5 * expected.std()
    rows = torch.tensor([[1, 2, 3], [4, 5, 6]])
    torch.testing.assert_close(fast(rows), plain(rows), atol=1e-4, rtol=1e-4)  # prompts and batches


def test_nothing_is_compiled_again_while_a_text_grows(plain_and_compiled):
    """No recompilation for caches of another size, or when a text reaches a cache's end."""
    _, model = plain_and_compiled
    assert n_compiled()
    torch._dynamo.utils.counters.clear()
    for n_prompt, n_tokens in ((2, 3), (2, 61), (2, 63), (2, 190), (120, 100)):
        for _ in steps(model, [Row([7] * n_prompt, n_tokens)], lambda logits: logits.argmax(-1), stop_tokens=()):
            pass
    assert not n_compiled()


@pytest.mark.parametrize("release", [{"rank": 4}, {"rotates": True}], ids=["QLoRA", "SpinQuant"])
def test_compiled_products_of_metas_int4_releases_round_their_inputs(fresh_compiler, release):
    module = random_release(**release).layers[0].feed_forward.w2  # rows of eight pieces
    x = torch.randn(1, module.shape[1], generator=torch.Generator().manual_seed(1))
    expected = module(x)
    module.rounds_inputs = False
    exact = module(x)
    module.rounds_inputs, module.matrix = True, PlanarInt4Linear(module.matrix)
    found = _FastOutput(module, torch.compile(matvec, options=OPTIONS, dynamic=False))(x)
    assert n_compiled() == 1
    # An input that another order of summation rounds differently moves results by 4 % of what
    # rounding does.
    assert (found - expected).std() < (exact - expected).std() / 10


def test_no_thread_outlives_the_call(monkeypatch):
    """A background thread's imports would add loggers while pytest iterates over all loggers."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch._inductor.cpu_vec_isa, "valid_vec_isa_list", lambda: time.sleep(0.5))
    before = set(threading.enumerate())
    compile_decode(random_model(torch.float32))
    assert set(threading.enumerate()) <= before


@torch._dynamo.config.patch(recompile_limit=1)
def test_models_do_not_share_the_variants_that_pytorch_allows_of_a_function(fresh_compiler, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, options, dynamic: compile(function, dynamic=dynamic, backend="eager")
    )
    for n_models, dtype in enumerate((torch.float32, torch.bfloat16), start=1):
        compile_decode(random_model(dtype))
        assert n_compiled() == 2 * n_models, "a layer and the output of each"


@torch.inference_mode()
def test_text_of_real_weights_stays_the_same_up_to_near_ties(fresh_compiler, demo_folder):
    options = {"max_seq_len": 128, "device": "cpu", "dtype": "bfloat16", "verify": "never"}
    plain, fast = (Llama.build(demo_folder, **options, compile=compile) for compile in (False, True))
    assert n_compiled() == 2, "a layer and the output"
    prompt = plain.encode("The capital of France is")
    [tokens], [logprobs] = fast.generate([prompt], 40, temperature=0, logprobs=True)
    logits = plain.model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
    behind = logits.amax(-1) - logits[torch.arange(len(tokens)), torch.tensor(tokens)]
    assert behind.max() <= NEAR_TIE
    assert (behind == 0).float().mean() >= 0.9
    expected = torch.log_softmax(logits, -1)[torch.arange(len(tokens)), torch.tensor(tokens)]
    torch.testing.assert_close(torch.tensor(logprobs), expected, atol=0.2, rtol=0)
    streamed = fast.stream("The capital of France is", 10, temperature=0)
    assert "".join(streamed) == fast.tokenizer.decode(tokens[:10])


def test_without_a_compiler_a_model_stays_as_it_is_and_one_line_says_so(monkeypatch, caplog, tmp_path):
    caplog.set_level("INFO", logger="llama_ref")
    monkeypatch.setenv("PATH", str(tmp_path))
    model = random_model(torch.float32)
    compile_decode(model)
    assert "forward" not in vars(model.layers[0])
    assert caplog.messages == ["no C++ compiler (c++, g++ or clang++) found: decoding stays uncompiled"]


def test_with_a_compiler_that_fails_a_model_computes_as_before(monkeypatch, caplog, tmp_path):
    plain, model = random_model(torch.float32, "int4"), random_model(torch.float32, "int4")
    # Empty: nothing was compiled before.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    # PyTorch caches them, which hides the failing compiler.
    torch._inductor.cpu_vec_isa.valid_vec_isa_list()
    with torch._inductor.config.patch({"cpp.cxx": (None, "false")}):
        compile_decode(model)
        expected, found = (decoded(each, [5, 7], [3, 1]) for each in (plain, model))
    torch.compiler.reset()
    assert "decoding stays uncompiled" in [r.message for r in caplog.records if r.name.startswith("llama_ref")][-1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rotation_without_complex_numbers_is_the_models(dtype):
    torch.manual_seed(1)
    x, angles = torch.randn(1, 7, 3, 64, dtype=dtype), 100 * torch.rand(1, 7, 1, 32)
    assert torch.equal(_rotate(x, angles.cos(), angles.sin()), rotate(x, angles.cos(), angles.sin()))


def test_pieces_hold_the_same_numbers_in_every_dtype():
    torch.manual_seed(1)
    matrix = Int8Linear.from_weight(torch.randn(24, 5120) * 1e-4)  # scales that float16 would round
    pieces = PiecewiseInt8Linear(matrix)
    assert torch.equal(pieces.dequantize(), matrix.dequantize())
    for dtype in (torch.float16, torch.float32):
        assert torch.equal(pieces(torch.eye(5120, dtype=dtype)), matrix(torch.eye(5120, dtype=dtype)))


def test_a_divided_model_is_refused():
    model = random_model(torch.float32)
    model.layers[0].attention.wo = RowParallelLinear(model.layers[0].attention.wo.weight, None)
    with pytest.raises(RequestError, match="compile works in one process"):
        compile_decode(model)


@pytest.mark.parametrize(
    ("columns", "group"), [(128, 128), (384, 64), (576, 64), (2048, 32), (512, 256), (96, 32), (5120, 128)]
)
def test_planes_hold_the_same_numbers_and_multiply_alike(columns, group):
    torch.manual_seed(1)
    matrix = Int4Linear.from_weight(torch.randn(24, columns), group)
    planar = PlanarInt4Linear(matrix)
    assert torch.equal(planar.dequantize(), matrix.dequantize())
    assert torch.equal(planar(torch.eye(columns)), matrix(torch.eye(columns)))
    x = torch.randn(columns)
    padded = torch.nn.functional.pad(x, (0, -columns % COLUMNS))
    found = product(padded, planar.words, planar.scale, planar.zero)
    torch.testing.assert_close(found, matrix.dequantize() @ x, atol=1e-4, rtol=1e-4)
