"""Captured decode steps give the plain ones' results.

Without a GPU, operators are recorded and replayed instead of kernels.
"""

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fake_cuda import fake_cuda
from folders import tiny_folder
from llama_ref.args import ModelArgs
from llama_ref.checkpoint.loading.empty_model import model_without_memory
from llama_ref.compiled import caches, cuda, cuda_cache
from llama_ref.compiled.caches import new_cache
from llama_ref.compiled.cuda import FastForward, FastHidden, FastPasses, compile_cuda_decode, next_width
from llama_ref.compiled.cuda_cache import FlashKVCache, FlashLengths
from llama_ref.decoding import loop
from llama_ref.decoding.loop import steps
from llama_ref.decoding.prompt_lookup import PromptLookup
from llama_ref.decoding.row import Row
from llama_ref.generation import Llama
from llama_ref.images import tiles_of
from llama_ref.kv_cache import KVCache
from llama_ref.model import Transformer
from llama_ref.quantization.apply import quantize_model
from llama_ref.session import Session
from random_models import as_int4_release, random_model
from vision_folders import PARAMS, noise

ARGS = ModelArgs.from_dict(
    {"dim": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 60, "multiple_of": 32, "norm_eps": 1e-5}
    | {"rope_theta": 500000.0, "use_scaled_rope": True}
)
ROWS = [[[1, 2, 3]], [[5]], [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]]
Step = Callable[[Tensor, Tensor], Tensor]


class Operators(TorchDispatchMode):
    """A CUDA graph of operators: replays each on the same tensors and writes results in place."""

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
    rows = [Row(prompt, n - i) for i, prompt in enumerate(prompts)]  # some rows end earlier
    for _ in steps(model, rows, greedy, stop_tokens=(), cache=cache):
        pass
    return [row.generated for row in rows]


def put_on(model: Transformer, capture: Callable) -> FastPasses:
    """`compile_cuda_decode` with another way to capture."""
    fast = FastPasses(model, capture)
    model.hidden, model.forward = FastHidden(fast), FastForward(fast)
    return fast


def plain_flash(q: Tensor, keys: Tensor, values: Tensor, at: FlashLengths) -> Tensor:
    """The kernel's result, row by row in float32: the last query is at the last key of `n_keys`."""
    B, T, H, _ = q.shape
    assert at.query_starts.tolist() == [T * row for row in range(B + 1)]
    assert at.key_starts.tolist() == [keys.shape[1] * row for row in range(B + 1)]
    assert max(at.n_keys.tolist()) <= at.width
    out = torch.empty_like(q)
    for row, n in enumerate(at.n_keys.tolist()):
        k, v = (x[row, :n].float().repeat_interleave(H // x.shape[2], dim=1).transpose(0, 1) for x in (keys, values))
        mask = torch.ones(T, n, dtype=torch.bool).tril(n - T)
        mixed = torch.nn.functional.scaled_dot_product_attention(q[row].float().transpose(0, 1), k, v, attn_mask=mask)
        out[row] = mixed.transpose(0, 1)
    return out


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch, caplog) -> None:
    caplog.set_level("INFO", logger="llama_ref")
    monkeypatch.setattr(cuda, "SMALLEST_WIDTH", 8)
    monkeypatch.setattr(caches, "CACHE_BLOCK", 1)  # and caches exactly as long as requested


@pytest.fixture(params=[KVCache, FlashKVCache], ids=["masked", "flash"])
def kind(request, monkeypatch) -> type[KVCache]:
    """The kind of cache: both run here, with the second's kernel written in PyTorch."""
    monkeypatch.setattr(caches, "kv_cache_class", lambda *_: request.param)
    monkeypatch.setattr(cuda_cache, "flash", plain_flash)
    return request.param


@pytest.fixture(scope="module")
def seeing() -> tuple[Transformer, Transformer]:
    """A plain vision model and another with the same weights."""
    args = ModelArgs.from_dict(PARAMS)
    return random_model(args, seed=0), random_model(args, seed=0)


@pytest.fixture
def pair(kind) -> Iterator[tuple[Transformer, Transformer]]:
    """A plain model, and a fast one whose passes are captured operator by operator."""
    plain, fast = (random_model(ARGS, seed=0) for _ in range(2))
    # The PyTorch version of the kernel reads its lengths.
    put_on(fast, unrecorded if kind is FlashKVCache else Operators)
    return plain, fast


# ---- the passes


@pytest.mark.parametrize("prompts", [ROWS[0], ROWS[2]], ids=["one", "ragged"])
@pytest.mark.parametrize(
    ("scheme", "dtype", "tolerance"),
    [
        (None, torch.float32, 1e-5),
        (None, torch.bfloat16, 0.13),
        (None, torch.float16, 1e-2),
        ("int8", torch.float32, 1e-5),
        ("int4:group=32", torch.float32, 1e-5),
        ("Meta's int4", torch.float32, 0.05),  # another order of summation may round an input differently
        ("Meta's int4, inputs not rounded", torch.float32, 1e-5),
    ],
)
@torch.inference_mode()
def test_passes_give_the_plain_ones_logits(kind, prompts, dtype, tolerance, scheme):
    """Prompts and 20 steps, of one token and of several, over caches that end within a width and on its edge."""
    model = random_model(ARGS, seed=0).to(dtype)
    if scheme and scheme.startswith("Meta's"):
        as_int4_release(model, rank=4, rounds_inputs="not" not in scheme)
    elif scheme:
        quantize_model(model, scheme)
    fast = FastPasses(model, unrecorded)
    for n_tokens in (34, 37) if scheme is None else (37,):  # matrices do not depend on caches
        caches = [new_cache(model, len(prompts), n_tokens) for _ in range(2)]
        tokens = torch.tensor([(prompt * 7)[:7] for prompt in prompts])
        hidden = model.hidden(tokens, caches[0]), fast.hidden(tokens, caches[1])
        torch.testing.assert_close(hidden[1], hidden[0], atol=tolerance, rtol=0)
        for cache in caches:
            cache.truncate([len(prompt) for prompt in prompts])
        for step in range(20):
            tokens = torch.full((len(prompts), 3 if step == 9 else 1), step)
            expected, found = model(tokens, caches[0]), fast.logits(tokens, caches[1])
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
        assert caches[0].longest == caches[1].longest
        assert caches[0].lengths.equal(caches[1].lengths)


def test_passes_look_at_the_images_of_their_cache(seeing, kind):
    plain, fast = seeing
    put_on(fast, unrecorded if kind is FlashKVCache else Operators)
    image = fast.image_id
    wide, square = tiles_of(noise(110, 50), 56, 4), tiles_of(noise(50, 50, 1), 56, 4)
    batches = [[([image, 5], [wide])], [([image, 5], [square])], [([image, 5], [wide])], [([7, 5], [])]]
    batches += [[([image, 5], [wide]), ([3, image, image], [square, wide]), ([9], [])]]
    answers = []
    for batch in batches:  # the first and third alternate with others at the same addresses
        found, expected = ([Row(prompt, 12, images) for prompt, images in batch] for _ in range(2))
        for rows, model in ((expected, plain), (found, fast)):
            for _ in steps(model, rows, greedy, stop_tokens=()):
                pass
        assert [row.generated for row in found] == [row.generated for row in expected]
        for row, other in zip(found, expected, strict=True):
            assert row.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        answers.append(expected[0].logprobs)
    assert answers[0] != answers[1] != answers[3], "the images matter"


def test_a_flash_cache_gives_the_plain_models_numbers(monkeypatch):
    """Without fused layers: pieces of prompts, ragged rows, truncated caches."""
    model = random_model(ARGS, seed=0)
    monkeypatch.setattr(cuda_cache, "flash", plain_flash)
    caches = [kind(ARGS, 3, 40, dtype=torch.float32, device="cpu") for kind in (KVCache, FlashKVCache)]
    caches[1].stored.fill_(float("nan"))
    for lengths, T in ((None, 9), ([9, 2, 5], 1), (None, 6), ([4, 4, 4], 13)):
        if lengths:
            for cache in caches:
                cache.truncate(lengths)
        tokens = torch.randint(60, (3, T))
        expected, found = (model(tokens, cache) for cache in caches)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="17 \\+ 24 tokens do not fit into a cache of 40"):
        model(torch.zeros(3, 24, dtype=torch.long), caches[1])


def test_a_cache_is_freed_with_its_last_reference(kind):
    """Not at the next garbage collection: a prompt's cache takes gigabytes."""
    model = random_model(ARGS, seed=0)
    cache = kind(ARGS, 1, 40, dtype=torch.float32, device="cpu")
    for n_tokens in (9, 1, 6):
        model(torch.randint(60, (1, n_tokens)), cache)
    gone = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("B", [1, 3])
def test_the_kernel_takes_these_shapes(B, T):
    """PyTorch's own meta implementation of its kernel, which checks shapes and devices."""
    with fake_cuda():
        q = torch.empty(B, T, 32, 128, dtype=torch.bfloat16, device="cuda")
        keys, values = (torch.empty(B, 64, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in "kv")
        at = FlashLengths.from_lengths(torch.empty(B, dtype=torch.long, device="cuda"), T, 64, 64)
        out = cuda_cache.flash(q, keys, values, at)
        assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "cuda")


def test_late_pieces_of_a_long_prompt_are_put_together_from_two_attentions(monkeypatch):
    """cuDNN's result in plain PyTorch: causal from the first key, with the scores' log-sum-exp."""

    def plain_cudnn(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        if is_causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
        return scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True)

    monkeypatch.setattr(cuda_cache, "cudnn_attention", plain_cudnn)
    q, (keys, values) = torch.randn(1, 7, 8, 16) * 3, torch.randn(2, 1, 40, 2, 16)
    for longest in (1, 20, 33):
        at = FlashLengths.from_lengths(torch.tensor([longest]), 7, 40, longest + 7)
        expected = plain_flash(q, keys, values, at)
        torch.testing.assert_close(cuda_cache.cudnn(q, keys, values, longest), expected)


def test_joined_matrices_are_the_models_own():
    """Weights are not stored twice, and the plain model computes the same bit for bit."""
    for scheme in (None, "int8", "int4:group=32"):
        model, untouched = random_model(ARGS, seed=0), random_model(ARGS, seed=0)
        for each in (model, untouched):
            if scheme:
                quantize_model(each, scheme)
        fast = FastPasses(model, unrecorded)
        for block, layer in zip(model.layers, fast.layers, strict=True):
            for whole, parts in (
                (layer.wqkv, (block.attention.wq, block.attention.wk, block.attention.wv)),
                (layer.w13, (block.feed_forward.w1, block.feed_forward.w3)),
            ):
                for name, tensor in whole.state_dict().items():
                    memory = [part.state_dict()[name].untyped_storage().data_ptr() for part in parts]
                    assert set(memory) == {tensor.untyped_storage().data_ptr()}
        tokens = torch.tensor([[1, 2, 3]])
        assert model(tokens).equal(untouched(tokens))


def test_widths_are_powers_of_two_with_room_for_the_new_tokens():
    cache = KVCache(ARGS, 1, 100, dtype=torch.float32)
    found = {}
    for cache.longest in (0, 7, 8, 15, 16, 63, 64, 99):
        found[cache.longest] = next_width(cache, 1)
    assert found == {0: 8, 7: 8, 8: 16, 15: 16, 16: 32, 63: 64, 64: 100, 99: 100}
    cache.longest = 7
    assert next_width(cache, 4) == 16


# ---- captured graphs


@pytest.mark.parametrize(
    ("prompts", "widths"),
    list(zip(ROWS, ([8, 16, 32], [8, 16, 31], [8, 16, 32, 37]), strict=True)),
    ids=["one", "one_token", "ragged"],
)
def test_replayed_text_is_the_plain_ones(pair, prompts, widths):
    plain, fast = pair
    assert generated(fast, prompts, 30) == generated(plain, prompts, 30)
    assert [key[-1] for key in fast.forward.recordings] == widths


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
    made = list(fast.forward.recordings.values())
    first.keys.fill_(float("nan"))  # whatever used the memory in between
    for name in ("keys", "values", "stored"):
        if hasattr(first, name):
            setattr(second, name, getattr(first, name))
    assert generated(fast, [[9, 8, 7]], 30, second) == generated(plain, [[9, 8, 7]], 30)
    assert list(fast.forward.recordings.values()) == made


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
    monkeypatch.setattr(cuda, "MOST_GRAPHS", 2)
    plain, fast = pair
    cache = new_cache(fast, 1, 64)
    for _ in range(2):
        assert generated(fast, [[1, 2, 3]], 30, cache) == generated(plain, [[1, 2, 3]], 30)
        assert [key[-1] for key in fast.forward.recordings] == [16, 32]


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
    put_on(fast.model, Operators)
    sessions = Session(plain, "Hi"), Session(fast, "Hi")
    for text in ("one", "two"):
        expected, found = (session.say(text, max_gen_len=12, temperature=0) for session in sessions)
        assert "".join(found) == "".join(expected)
        assert found.tokens == expected.tokens
    plain.speculation = fast.speculation = PromptLookup()
    prompts = [[1, 2, 3] * 6, [4, 5]]
    assert fast.generate(prompts, 24, temperature=0) == plain.generate(prompts, 24, temperature=0)
    assert fast.model.forward.recordings


def test_prompts_and_gradients_are_left_alone(pair):
    plain, fast = pair
    tokens = torch.tensor([[1, 2, 3]])
    assert fast(tokens).equal(plain(tokens))
    fast.norm.weight.requires_grad_(True)
    fast(tokens).sum().backward()
    assert fast.norm.weight.grad is not None
    assert not fast.forward.recordings


def test_a_model_that_is_let_go_is_gone_at_once():
    model = random_model(ARGS, seed=0)
    put_on(model, unrecorded)
    generated(model, [[1, 2, 3]], 4)
    gone = weakref.ref(model.norm.weight)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


# ---- failures


def test_what_cannot_be_recorded_decodes_as_ever_and_one_line_says_so(pair, caplog):
    plain, fast = pair

    def refuses(step: Step, *inputs: Tensor) -> Callable[[], Tensor]:
        step(*inputs)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    fast.forward.fast.capture = refuses
    for prompts in ROWS:
        assert generated(fast, prompts, 12) == generated(plain, prompts, 12)
    assert caplog.messages == [
        "cannot capture a decode step here (operation not permitted when stream is capturing): launching its kernels one by one"
    ]


def test_kernels_that_cannot_be_prepared_leave_the_model_as_it_was(monkeypatch, caplog):
    class OutOfResources(Exception):  # Triton's errors are not RuntimeErrors
        pass

    def refuses(*_: object) -> Tensor:
        raise OutOfResources("shared memory, Required: 241664, Hardware limit: 101376")

    plain, fast = random_model(ARGS, seed=0), random_model(ARGS, seed=0)
    monkeypatch.setattr(cuda, "CudaGraphs", lambda device: unrecorded)
    monkeypatch.setattr(cuda, "norm_query", refuses)
    compile_cuda_decode(fast)
    assert not {"hidden", "forward"} & vars(fast).keys()
    assert generated(fast, ROWS[2], 12) == generated(plain, ROWS[2], 12)
    assert caplog.messages[-1].startswith("cannot prepare the decode step here (shared memory, Required: 241664")


@pytest.mark.parametrize("ends_badly", [False, True])
def test_out_of_memory_costs_a_call_not_the_feature(pair, caplog, ends_badly):
    plain, fast = pair
    passes = fast.forward.fast
    whole, asked = passes.capture, []

    def full(step: Step, *inputs: Tensor) -> Callable[[], Tensor]:
        asked.append(step)
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        finally:
            if ends_badly:  # as `torch.cuda.graph` may, when it ends a capture that failed
                raise RuntimeError("operation failed due to a previous error during capture")

    first = new_cache(fast, 1, 40)
    generated(fast, ROWS[0], 12, first)
    passes.capture = full
    assert generated(fast, ROWS[0], 12) == generated(plain, ROWS[0], 12)
    assert asked and not passes.graphs, "what others held was given up for it"
    passes.capture = whole
    assert generated(fast, ROWS[0], 12) == generated(plain, ROWS[0], 12)
    assert passes.graphs
    assert caplog.messages == []


# ---- the loop


def test_the_next_step_is_launched_before_the_host_has_seen_the_last(kind, monkeypatch):
    """Text, log-probabilities and cache are unchanged, with stop tokens and rows that end early."""
    plain, fast = random_model(ARGS, seed=0), random_model(ARGS, seed=0)
    put_on(fast, unrecorded)
    order = []
    fetching, decode = loop.fetching, loop._decode

    def spied(numbers: Tensor) -> Callable[[], list]:
        order.append("ask")
        fetch = fetching(numbers)
        return lambda: order.append("fetch") or fetch()

    monkeypatch.setattr(loop, "fetching", spied)
    monkeypatch.setattr(loop, "_decode", lambda *args: order.append("decode") or decode(*args))
    for prompts in ROWS:
        [text, *_] = generated(plain, prompts, 20)
        for stop in ((), {text[5]}):
            made = []
            for model in (plain, fast):
                order.clear()
                rows = [Row(prompt, 12 - i) for i, prompt in enumerate(prompts)]
                cache = new_cache(model, len(rows), 25)
                for _ in steps(model, rows, greedy, stop, cache=cache):
                    known = [len(row.prompt) + len(row.generated) for row in rows]
                    assert all(length <= n for length, n in zip(cache.lengths.tolist(), known, strict=True))
                made.append([(row.generated, row.finish_reason, row.stop_token) for row in rows])
                logprobs = [row.logprobs for row in rows]
            assert made[0] == made[1]
            assert all(len(p) == len(t[0]) for p, t in zip(logprobs, made[1], strict=True))
            assert order[:3] == ["ask", "decode", "fetch"]  # of the fast model
            assert order.count("ask") == order.count("fetch")  # one copy per step


def test_a_step_brings_one_tensor_to_the_host(pair):
    _, fast = pair
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                copies.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    rows = [Row([1, 2, 3], 10)]
    making = steps(fast, rows, greedy, stop_tokens=())
    next(making)
    with Copies():
        next(making)
    assert copies == []  # tolist() of one tensor, nothing number by number


# ---- CUDA


@pytest.mark.parametrize(
    ("scheme", "n_rows", "cache_kind", "dtype"),
    [
        (None, 1, FlashKVCache, torch.bfloat16),
        (None, 3, KVCache, torch.float16),
        ("int8", 3, FlashKVCache, torch.float16),
        ("int4", 1, KVCache, torch.bfloat16),
        ("int4", 3, FlashKVCache, torch.float16),
    ],
)
def test_on_cuda_everything_stays_on_the_device(monkeypatch, scheme, n_rows, cache_kind, dtype):
    monkeypatch.setattr(caches, "kv_cache_class", lambda *_: cache_kind)
    with fake_cuda():
        model = model_without_memory(ModelArgs.from_dict(vars(ARGS) | {"dim": 256, "n_heads": 4, "n_layers": 2}))
        weights = {name: torch.empty(p.shape, dtype=dtype, device="cuda") for name, p in model.named_parameters()}
        model.load_state_dict(weights, assign=True)
        model.requires_grad_(False)
        if scheme:
            quantize_model(model, scheme)
        fast = FastPasses(model, unrecorded)
        cache = new_cache(model, n_rows, 100)
        for T in (17, 1, 3):
            tokens = torch.zeros(n_rows, T, dtype=torch.long, device="cuda")
            for out, last in ((fast.hidden(tokens, cache), 256), (fast.logits(tokens, cache), 60)):
                assert out.shape == (n_rows, T, last)
                assert out.device.type == "cuda"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("prompts", ROWS, ids=["one", "one_token", "ragged"])
def test_greedy_text_on_cuda_is_the_plain_ones(prompts, caplog):
    plain, fast = (random_model(ARGS, seed=0).cuda() for _ in range(2))
    compile_cuda_decode(fast)
    for _ in range(2):  # the second call uses another cache
        assert generated(fast, prompts, 60) == generated(plain, prompts, 60)
    assert fast.forward.recordings
    assert caplog.messages == ["preparing the decode step: a few seconds, longer the first time"]
