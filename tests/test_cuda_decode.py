"""Recorded decode steps give what the plain ones give. Without a GPU, operators are recorded and replayed, not kernels."""

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fake_cuda import fake_cuda
from folders import tiny_folder
from llama_ref import cuda_decode, loop
from llama_ref.args import ModelArgs
from llama_ref.cuda_decode import StaticDecode, compile_cuda_decode, compiled_layer_step, decode_step, layer_step, window
from llama_ref.generation import Llama
from llama_ref.loop import Row, new_cache, steps
from llama_ref.model import KVCache, Transformer
from llama_ref.quantization.kernels import CudaInt4Linear
from llama_ref.quantization.modules import Int4Linear, Int8Linear
from llama_ref.quantize import quantize_model, use_fast_kernels
from llama_ref.session import Session
from llama_ref.speculate import NGrams
from random_models import random_model

ARGS = ModelArgs.from_dict(
    {"dim": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 60, "multiple_of": 32, "norm_eps": 1e-5}
    | {"rope_theta": 500000.0, "use_scaled_rope": True}
)
ROWS = [[[1, 2, 3]], [[5]], [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]]
Step = Callable[[Tensor, Tensor], Tensor]


class Operators(TorchDispatchMode):
    """What a CUDA graph is to kernels: every operator again, on the tensors that it met, its results to where they were."""

    def __init__(self, step: Step, *inputs: Tensor):
        super().__init__()
        self.calls = []
        with self:
            self.out = step(*inputs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def __call__(self) -> Tensor:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # not a view, and not changed in place
                    old.copy_(new)
        return self.out


def unrecorded(step: Step, *inputs: Tensor) -> Callable[[], Tensor]:
    return lambda: step(*inputs)


def greedy(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def generated(model: Transformer, prompts: list[list[int]], n: int, cache: KVCache | None = None) -> list[list[int]]:
    rows = [Row(prompt, n - i) for i, prompt in enumerate(prompts)]  # some end earlier
    for _ in steps(model, rows, greedy, stop_tokens=(), cache=cache):
        pass
    return [row.generated for row in rows]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch) -> None:
    monkeypatch.setattr(cuda_decode, "SMALLEST_WINDOW", 8)
    monkeypatch.setattr(loop, "CACHE_BLOCK", 1)  # and caches as long as they are asked for


@pytest.fixture
def pair() -> Iterator[tuple[Transformer, Transformer]]:
    """A plain model, and the same one recorded."""
    plain, fast = (random_model(ARGS, seed=0) for _ in range(2))
    fast.hidden = StaticDecode(fast, layer_step, Operators)
    return plain, fast


@torch.inference_mode()
def assert_same_logits(model: Transformer, step: Callable[..., Tensor], prompts: list[list[int]], **tolerance: float) -> None:
    """Of 20 steps, over caches that end within a window and on its edge."""
    decode = StaticDecode(model, step, unrecorded)
    for n_tokens in (29, 32):
        caches = [new_cache(model, len(prompts), n_tokens) for _ in range(2)]
        tokens = torch.tensor([(prompt * 7)[:7] for prompt in prompts])
        for cache in caches:
            model.hidden(tokens, cache)
            cache.set_lengths([len(prompt) for prompt in prompts])
        for token in range(20):
            tokens = torch.full((len(prompts), 1), token)
            expected, found = Transformer.hidden(model, tokens, caches[0]), decode(tokens, caches[1])
            torch.testing.assert_close(model.logits(found), model.logits(expected), **tolerance)
        assert caches[0].longest == caches[1].longest
        assert caches[0].lengths.equal(caches[1].lengths)


# ---- the step


@pytest.mark.parametrize("prompts", ROWS, ids=["one", "one_token", "ragged"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.13), (torch.float16, 8e-3)], ids=["fp32", "bf16", "fp16"]
)
def test_steps_give_the_plain_ones_logits(prompts, dtype, tolerance):
    assert_same_logits(random_model(ARGS, seed=0).to(dtype), layer_step, prompts, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("scheme", "dtype", "tolerance"),
    [(None, torch.float32, 1e-5), ("int8", torch.float16, 8e-3), ("int4:group=32", torch.bfloat16, 0.13)],
    ids=["fp32", "fp16_int8", "bf16_int4"],
)
def test_one_compiled_layer_serves_all_layers_lengths_and_caches(scheme, dtype, tolerance):
    torch.compiler.reset()
    model = random_model(ARGS, seed=0).to(dtype)
    if scheme:
        quantize_model(model, scheme)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer_step, backend=counter, dynamic=False, fullgraph=True)
    for prompts in (ROWS[0], ROWS[2]):
        assert_same_logits(model, compiled, prompts, atol=tolerance, rtol=0)
    assert counter.frame_count == 4  # one row or several, and looking at a part of the cache or at all of it
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same_logits(model, compiled, ROWS[1], atol=tolerance, rtol=0)
        assert_same_logits(model, compiled, ROWS[2][:2], atol=tolerance, rtol=0)
        assert_same_logits(model, compiled, [[1]] * 6, atol=tolerance, rtol=0)
    assert counter.frame_count == 4


def test_windows_are_powers_of_two_with_room_for_one_more():
    cache = KVCache(ARGS, 1, 100, dtype=torch.float32)
    found = {}
    for cache.longest in (0, 7, 8, 15, 16, 63, 64, 99):
        found[cache.longest] = window(cache)
    assert found == {0: 8, 7: 8, 8: 16, 15: 16, 16: 32, 63: 64, 64: 100, 99: 100}


# ---- recordings


@pytest.mark.parametrize(
    ("prompts", "widths"),
    zip(ROWS, ([8, 16, 32], [8, 16, 31], [8, 16, 32, 37]), strict=True),
    ids=["one", "one_token", "ragged"],
)
def test_replayed_text_is_the_plain_ones(pair, prompts, widths):
    plain, fast = pair
    assert generated(fast, prompts, 30) == generated(plain, prompts, 30)
    assert [key[-1] for key in fast.hidden.recordings] == widths


def test_a_caches_junk_is_never_seen(pair):
    plain, fast = pair
    for prompts in ROWS:
        cache = new_cache(fast, len(prompts), 40)
        cache.keys.fill_(float("nan"))
        cache.values.fill_(float("nan"))
        assert generated(fast, prompts, 30, cache) == generated(plain, prompts, 30)


def test_another_cache_in_the_same_memory_finds_its_recordings_made(pair):
    plain, fast = pair
    first, second = (new_cache(fast, 1, 40) for _ in range(2))
    generated(fast, [[1, 2, 3]], 30, first)
    made = list(fast.hidden.recordings.values())
    first.keys.fill_(float("nan"))  # whoever had the memory in between
    second.keys, second.values = first.keys, first.values
    assert generated(fast, [[9, 8, 7]], 30, second) == generated(plain, [[9, 8, 7]], 30)
    assert list(fast.hidden.recordings.values()) == made


def test_caches_that_take_turns_stay_apart(pair):
    plain, fast = pair
    caches = [new_cache(fast, 1, 64) for _ in range(2)]
    texts: list[list[int]] = [[1, 2, 3], [9, 8]]
    for _ in range(3):
        for i, cache in enumerate(caches):
            [made] = generated(fast, [texts[i]], 6, cache)
            assert [made] == generated(plain, [texts[i]], 6)
            texts[i] += [*made, 5 + i]


def test_the_least_recently_used_recordings_go(pair, monkeypatch):
    monkeypatch.setattr(cuda_decode, "MOST_RECORDINGS", 2)
    plain, fast = pair
    cache = new_cache(fast, 1, 64)
    for _ in range(2):
        assert generated(fast, [[1, 2, 3]], 30, cache) == generated(plain, [[1, 2, 3]], 30)
        assert [key[-1] for key in fast.hidden.recordings] == [16, 32]


def test_a_full_cache_is_refused_as_ever(pair):
    plain, fast = pair
    for model in (plain, fast):
        cache = new_cache(model, 1, 3)
        generated(model, [[1, 2]], 2, cache)
        with pytest.raises(ValueError, match="3 \\+ 1 tokens do not fit into a cache of 3"):
            model(torch.tensor([[1]]), cache)


def test_conversations_and_guesses_go_on_as_ever(tmp_path):
    folder = tiny_folder(tmp_path / "tiny")
    options = {"max_seq_len": 128, "device": "cpu", "dtype": "float32", "verify": "never"}
    plain, fast = (Llama.build(folder, **options) for _ in range(2))
    fast.model.hidden = StaticDecode(fast.model, layer_step, Operators)
    sessions = Session(plain, "Hi"), Session(fast, "Hi")
    for text in ("one", "two"):
        expected, found = (session.say(text, max_gen_len=12, temperature=0) for session in sessions)
        assert "".join(found) == "".join(expected)
        assert found.tokens == expected.tokens
    plain.speculation = fast.speculation = NGrams()
    prompts = [[1, 2, 3] * 6, [4, 5]]
    assert fast.generate(prompts, 24, temperature=0) == plain.generate(prompts, 24, temperature=0)
    assert fast.model.hidden.recordings


def test_prompts_and_gradients_are_left_alone(pair):
    plain, fast = pair
    tokens = torch.tensor([[1, 2, 3]])
    assert fast(tokens).equal(plain(tokens))
    fast.norm.weight.requires_grad_(True)
    fast(tokens).sum().backward()
    assert fast.norm.weight.grad is not None
    assert not fast.hidden.recordings


def test_a_model_that_is_let_go_is_gone_at_once():
    model = random_model(ARGS, seed=0)
    model.hidden = StaticDecode(model, layer_step, unrecorded)
    generated(model, [[1, 2, 3]], 4)
    gone = weakref.ref(model.norm.weight)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


# ---- where it cannot be done


def test_what_cannot_be_recorded_decodes_as_ever_and_one_line_says_so(pair, capsys):
    plain, fast = pair

    def refuses(step: Step, *inputs: Tensor) -> Callable[[], Tensor]:
        step(*inputs)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    fast.hidden.record = refuses
    for prompts in ROWS:
        assert generated(fast, prompts, 12) == generated(plain, prompts, 12)
    assert capsys.readouterr().err.splitlines() == [
        "the decode step cannot be recorded here (operation not permitted when stream is capturing): decoding stays uncompiled"
    ]


def test_without_a_compiler_steps_are_uncompiled_and_one_line_says_so(monkeypatch, capsys, tmp_path):
    torch.compiler.reset()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert compiled_layer_step(random_model(ARGS, seed=0)) is layer_step
    compiling, failed = capsys.readouterr().err.splitlines()
    assert compiling == "compiling the decode step: some seconds, fewer the next time"
    assert failed.startswith("it cannot be compiled here (")
    assert failed.endswith("): decode steps are recorded uncompiled")


# ---- CUDA


@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize(
    ("capability", "scheme", "layer"),
    [
        ((8, 0), None, torch.nn.Linear),
        ((8, 0), "int8", Int8Linear),
        ((8, 0), "int4", CudaInt4Linear),
        ((7, 5), None, torch.nn.Linear),
        ((7, 5), "int8", Int8Linear),
        ((7, 5), "int4", Int4Linear),
    ],
)
def test_on_cuda_everything_stays_on_the_device(monkeypatch, capability, scheme, layer, n_rows):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    with fake_cuda():
        with torch.device("meta"):
            model = Transformer(ModelArgs.from_dict(vars(ARGS) | {"dim": 256, "n_heads": 4}))
        weights = {name: torch.empty(p.shape, dtype=dtype, device="cuda") for name, p in model.named_parameters()}
        model.load_state_dict(weights, assign=True)
        model.requires_grad_(False)
        if scheme:
            quantize_model(model, scheme)
            use_fast_kernels(model)
        assert type(model.layers[0].attention.wq) is layer
        cache = new_cache(model, n_rows, 100)
        tokens = torch.zeros(n_rows, 1, dtype=torch.long, device="cuda")
        for width in (8, 64, 100):
            out = decode_step(model, layer_step, tokens, cache.lengths, cache.keys, cache.values, width)
            assert out.shape == (n_rows, 1, 256)
            assert out.device.type == "cuda"
            assert out.dtype == dtype


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("prompts", ROWS, ids=["one", "one_token", "ragged"])
def test_greedy_text_on_cuda_is_the_plain_ones(prompts, capsys):
    plain, fast = (random_model(ARGS, seed=0).cuda() for _ in range(2))
    compile_cuda_decode(fast)
    for _ in range(2):  # the second call brings a cache of its own
        assert generated(fast, prompts, 60) == generated(plain, prompts, 60)
    assert fast.hidden.recordings
    assert capsys.readouterr().err.splitlines() == ["compiling the decode step: some seconds, fewer the next time"]
