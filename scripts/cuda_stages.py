"""The stages of bench_cuda.py, one function each; bench_cuda.py lists what they measure."""

import datetime
import importlib.util
import inspect
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_figures import (
    TOY,
    Run,
    agreement,
    bytes_per_step,
    decode,
    free_memory,
    kv_bytes,
    memory_available,
    prefill_seconds,
    random_ids,
    recorded,
    relative_error,
    release,
)
from llama_ref.bench.machine import forget_peak, peak_bytes
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.compiled.caches import new_cache
from llama_ref.compiled.cpu import compile_decode
from llama_ref.formatting import dtype_name
from llama_ref.images import Tiles
from llama_ref.kv_cache import KVCache
from llama_ref.model import Transformer
from llama_ref.plan import Model, Workload, count_parameters, plan
from llama_ref.quantization.apply import quantize_model, quantized_bytes, use_fast_kernels
from llama_ref.sampling import SamplingParams

REPOSITORY = Path(__file__).resolve().parents[1]
BACKENDS = {-1: "error", 0: "math", 1: "flash", 2: "memory-efficient", 3: "cudnn", 4: "overrideable"}
SAMPLED = SamplingParams(temperature=0.6, top_p=0.9, seed=0)
CHECKPOINT = "consolidated.00.pth"
LEAST_FOR_A_MODEL = 20  # seconds to make, compile and measure one more
USUAL = 1000  # tokens of context for measurements at a single length


# ---- env


def env(run: Run) -> None:
    run.say("versions", **_versions(run))
    with run.attempt("read bandwidth"):
        run.say("read bandwidth", GB_s=run.measure_read_bandwidth())
    with run.attempt("copy bandwidth"):
        n_bytes = 1 << 20 if run.rehearse else int(min(1 << 32, run.free_bytes() / 4))
        source = torch.zeros(n_bytes, dtype=torch.uint8, device=run.device)
        target = torch.empty_like(source)
        seconds = run.device_seconds(lambda: target.copy_(source))
        run.say("copy bandwidth, read + written", GB_s=2 * source.numel() / seconds / 1e9)
    with run.attempt("matrix product"):
        n = 128 if run.rehearse or not run.on_cuda else 8192
        a, b = (torch.randn(n, n, dtype=run.dtype, device=run.device) for _ in range(2))
        seconds = run.device_seconds(lambda: a @ b)
        run.say(f"matrix product {n}^3", TFLOP_s=2 * n**3 / seconds / 1e12, dtype=dtype_name(run.dtype))
    _say_backends(run)


def _versions(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
    found["commit"] = _output("git", "-C", str(REPOSITORY), "rev-parse", "HEAD") or "unknown"
    if run.on_cuda:
        card = torch.cuda.get_device_properties(run.device)
        free, total = torch.cuda.mem_get_info(run.device)
        found |= {"card": card.name, "capability": f"{card.major}.{card.minor}", "sms": card.multi_processor_count}
        found |= {"memory_GB": total / 1e9, "free_GB": free / 1e9}
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    else:
        found["card"] = platform.processor() or platform.machine()
    found |= {"python": platform.python_version(), "torch": torch.__version__}
    return found | {name: _version(name) for name in ("triton", "transformers")} | {"dtype": dtype_name(run.dtype)}


def _output(*command: str) -> str:
    """The first line of a command's output; empty if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout.splitlines() or [""])[0].strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _say_backends(run: Run) -> None:
    """Print PyTorch's attention backend for each kind of call, with and without our settings."""
    for call, (B, H, K, T, S, masked) in {
        "prompt, causal, grouped heads": (1, 32, 8, 512, 512, False),
        "second piece of a prompt, masked": (1, 8, 8, 4 * 512, 1024, True),
        "decode, masked": (1, 8, 8, 4, 300, True),
        "decode of 8 rows, masked": (8, 8, 8, 4, 300, True),
    }.items():
        with run.attempt(f"attention: {call}"):
            found = {}
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                q = torch.empty(B, H, T, 128, dtype=dtype, device=run.device)
                k = torch.empty(B, K, S, 128, dtype=dtype, device=run.device)
                mask = torch.ones(B, 1, T, S, dtype=torch.bool, device=run.device) if masked else None
                found[dtype_name(dtype)] = _backends(run, q, k, mask)
            run.say(f"attention: {call}", **found)
    run.prepare()


def _backends(run: Run, q: Tensor, k: Tensor, mask: Tensor | None) -> str:
    """Names of the backends, such as "cudnn, here flash"."""

    def ask() -> str:
        options = {"is_causal": mask is None, "enable_gqa": q.shape[1] != k.shape[1]}
        choice = torch._fused_sdp_choice(q, k, k, attn_mask=mask, dropout_p=0.0, **options)
        return BACKENDS.get(int(choice), str(choice))

    if not run.on_cuda:
        return ask()
    torch.backends.cuda.enable_cudnn_sdp(True)
    default = ask()
    run.prepare()
    return f"{default}, here {ask()}"


# ---- correctness


def tests(run: Run) -> None:
    files = ["tests/test_on_cuda.py"] if run.rehearse else []
    options = ["-m", "cuda", "-p", "no:cacheprovider", "-o", "addopts=", "-v", "-rfEs", "--strict-markers", "--durations=10"]
    if importlib.util.find_spec("xdist") and not run.rehearse:
        options += ["-n", "6", "--dist", "load"]
    command = [sys.executable, "-u", "-m", "pytest", *options, *files]
    path = run.out / "tests.txt"
    with path.open("w") as file:  # a file keeps what was printed before a time limit
        done = subprocess.run(command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, check=False)
    lines = path.read_text().strip().splitlines() or ["no output"]
    run.say("pytest -m cuda", returncode=done.returncode, last_line=lines[-1].strip("= "))
    if done.returncode:
        with run.attempt("pytest -m cuda"):
            raise RuntimeError("a test failed, see tests.txt:\n" + "\n".join(lines[-200:]))


def parity(run: Run) -> None:
    run.prepare()
    for dtype in dict.fromkeys((torch.float32, run.dtype)):
        model = run.model("1B", dtype, n_layers=4)
        with run.attempt(f"transformers, {dtype_name(dtype)}"), torch.inference_mode():
            _compare_with_transformers(run, model)
        with run.attempt(f"in pieces, {dtype_name(dtype)}"), torch.inference_mode():
            _compare_pieces(run, model)
        with run.attempt(f"compiled, {dtype_name(dtype)}"):
            eager = decode(run, model, run.tokens(300), run.steps(64), batch=3).tokens
            compile_decode(model)
            fast = decode(run, model, run.tokens(300), run.steps(64), batch=3).tokens
            same = [agreement(a, b) for a, b in zip(fast, eager, strict=True)]
            run.say(f"compiled tokens as eager, {dtype_name(dtype)}", same=fast == eager, tokens=same)
        del model


def _compare_with_transformers(run: Run, model: Transformer) -> None:
    ids = _ids(run, model, 2, 1500)
    with torch.device(run.device):
        theirs = _oracles().hugging_faces_model(model)
    found, expected = model(ids), theirs(ids).logits.float()
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    name = f"transformers, {dtype_name(model.norm.weight.dtype)}"
    run.say(name, relative_error=relative_error(found, expected), same_argmax=float(same))


def _compare_pieces(run: Run, model: Transformer) -> None:
    ids = _ids(run, model, 2, 1500)
    T, dtype = ids.shape[1], model.norm.weight.dtype
    cache = KVCache(model.args, 2, T, dtype=dtype, device=run.device)
    pieces = torch.cat([model(piece, cache) for piece in ids.split([T - 7, 4, 1, 1, 1], dim=1)], dim=1)
    run.say(f"in pieces, {dtype_name(dtype)}", relative_error=relative_error(pieces, model(ids)))


def _ids(run: Run, model: Transformer, rows: int, n: int) -> Tensor:
    """Random ids (rows, n)."""
    n = run.tokens(n) if not run.rehearse else 16
    return torch.tensor([random_ids(model.args.vocab_size, n, seed) for seed in range(rows)], device=run.device)


def _oracles() -> Any:
    """The tests' module that puts our weights into transformers' model."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from parity import oracles

    return oracles


# ---- speed of whole models


def bf16(run: Run) -> None:
    size = run.largest()
    _measure_model(run, size, contexts=(128, USUAL, 8000, 32000, 120000), prompts=(512, 2048, 8192))


def small(run: Run) -> None:
    if run.largest() == "1B" and not run.rehearse:
        return run.say("skipped: the stage bf16 measured the 1B already")
    return _measure_model(run, "1B", contexts=(128, USUAL, 8000), prompts=(512, 2048, 8192), long_prompts=(32768,))


def _measure_model(
    run: Run,
    size: str,
    contexts: tuple[int, ...],
    prompts: tuple[int, ...],
    long_prompts: tuple[int, ...] = (8192, 32768, 131072),
) -> None:
    run.prepare()
    seconds = time.perf_counter()
    model = run.model(size)
    run.synchronize()
    weights = bytes_per_step(model)
    run.say(f"{size} made", seconds=time.perf_counter() - seconds, GB_per_step=weights / 1e9, dtype=dtype_name(run.dtype))
    eager = compiled = None
    with run.attempt(f"{size} eager decode"):
        decode(run, model, run.tokens(300), run.steps(4))
        eager = decode(run, model, run.tokens(300), run.steps(32))
        run.say(f"{size} eager decode after 300", **eager.figures(run, weights + kv_bytes(model, 300)))
    _measure_prefills(run, model, f"{size} eager", prompts)
    run.profile(f"{run.stage}_prefill", lambda: prefill_seconds(run, model, run.tokens(2048)))
    with run.attempt(f"{size} compile"):
        run.say(f"{size} compile_decode", seconds=run.seconds(lambda: compile_decode(model)), **recorded(model))
    with run.attempt(f"{size} compiled tokens"):
        compiled = decode(run, model, run.tokens(300), run.steps(32))
        run.say(f"{size} first compiled text", first_s=compiled.first_s, worst_ms=compiled.worst_ms, **recorded(model))
        before = recorded(model)["recordings"]
        again = decode(run, model, run.tokens(217), run.steps(32))
        new = None if before is None else recorded(model)["recordings"] - before
        run.say(f"{size} another prompt length", worst_ms=again.worst_ms, new_recordings=new)
    if eager and compiled:
        same = agreement(compiled.tokens[0], eager.tokens[0])
        run.say(f"{size} compiled tokens as eager", same=compiled.tokens == eager.tokens, tokens=same)
    for context in contexts:
        with run.attempt(f"{size} compiled decode after {context}"):
            _measure_decode(run, model, size, context, weights)
    with run.attempt(f"{size} sampled"):
        sampled = decode(run, model, run.tokens(USUAL), run.steps(32), filled=True, sampling=SAMPLED)
        run.say(f"{size} compiled, temperature .6, top_p .9", **sampled.figures(run))
    run.profile(f"{run.stage}_decode", lambda: decode(run, model, run.tokens(USUAL), run.steps(8), filled=True))
    _measure_prefills(run, model, f"{size} compiled", long_prompts)


def _measure_decode(run: Run, model: Transformer, size: str, context: int, weights: int) -> None:
    cache_bytes = kv_bytes(model, context + 64)
    if not _has_room(run, f"{size} compiled decode after {context}", 1.1 * cache_bytes + 1e9):
        return
    first = decode(run, model, run.tokens(context), run.steps(8), filled=True)
    run.forget_peak()
    found = decode(run, model, run.tokens(context), run.steps(48), filled=True)
    run.say(
        f"{size} compiled decode after {context}",
        **found.figures(run, weights + kv_bytes(model, run.tokens(context))),
        first_call_worst_ms=first.worst_ms,
        peak_GB=run.peak_GB(),
        **recorded(model),
    )


def _measure_prefills(run: Run, model: Transformer, name: str, lengths: tuple[int, ...]) -> None:
    """Measure each length; skip one that needs more than half of the time left."""
    seconds, done = 0.0, 1
    for n in lengths:
        what = f"{name}, prefill {n}"
        expected = seconds * (n / done) ** 1.5
        if expected > run.seconds_left / 2:
            run.say(f"{what}: skipped, too long", expected_s=expected, seconds_left=run.seconds_left)
            continue
        if not _has_room(run, what, 1.1 * kv_bytes(model, n) + 3e9):
            continue
        with run.attempt(what):
            first = {"first_s": prefill_seconds(run, model, run.tokens(n))} if n <= 32768 else {}
            run.forget_peak()
            seconds, done = prefill_seconds(run, model, run.tokens(n)), n
            run.say(what, seconds=seconds, tokens_s=run.tokens(n) / seconds, peak_GB=run.peak_GB(), **first)


def _has_room(run: Run, what: str, n_bytes: float) -> bool:
    """Whether the GPU has this many bytes left; prints a line if not."""
    free_memory(run.device)
    if run.rehearse or not run.on_cuda or run.free_bytes() > n_bytes:
        return True
    run.say(f"{what}: skipped, no room", needs_GB=n_bytes / 1e9, free_GB=run.free_bytes() / 1e9)
    return False


# ---- quantization and batches


def quant(run: Run) -> None:
    run.prepare()
    size = run.largest()
    for scheme in ("int4", "int8"):
        with run.attempt(f"{size} {scheme}"):
            _measure_scheme(run, size, scheme)


def _measure_scheme(run: Run, size: str, scheme: str) -> None:
    n, name = run.tokens(USUAL), f"{size} {scheme}"
    model = run.model(size)
    seconds = run.seconds(lambda: quantize_model(model, scheme))
    n_bytes = bytes_per_step(model)
    expected = model.layers[0].feed_forward.w1.dequantize()
    use_fast_kernels(model)
    free_memory(run.device)
    held = {"matrices_GB": quantized_bytes(model) / 1e9, "held_GB": run.held_GB()}
    run.say(f"{name} quantized", seconds=seconds, GB_per_step=n_bytes / 1e9, **held)
    _compare_kernels(run, model, scheme, expected)
    del expected
    _measure_prefills(run, model, f"{name} eager", (2048,))
    n_bytes += kv_bytes(model, n)
    decode(run, model, n, run.steps(4), filled=True)
    run.say(f"{name} eager decode after {USUAL}", **decode(run, model, n, run.steps(16), filled=True).figures(run, n_bytes))
    if not run.on_cuda:  # the CPU's compiled step needs the matrices without fast kernels
        model = run.model(size)
        quantize_model(model, scheme)
    seconds = run.seconds(lambda: compile_decode(model))
    run.say(f"{name} compile_decode", seconds=seconds, held_GB=run.held_GB())
    decode(run, model, n, run.steps(8), filled=True)
    figures = decode(run, model, n, run.steps(48), filled=True).figures(run, n_bytes)
    unquantized = run.figure("bf16", f"{size} compiled decode after {USUAL}", "tokens_s")
    ratio = figures["tokens_s"] / unquantized if unquantized else None
    run.say(f"{name} compiled decode after {USUAL}", **figures, times_unquantized=ratio)
    run.profile(f"{scheme}_decode", lambda: decode(run, model, n, run.steps(8), filled=True))
    run.profile(f"{scheme}_prefill", lambda: prefill_seconds(run, model, run.tokens(2048)))


def _compare_kernels(run: Run, model: Transformer, scheme: str, expected: Tensor) -> None:
    """Compare one matrix's products with float32, for row counts that take different code paths."""
    module = model.layers[0].feed_forward.w1
    for rows in (1, 8, 40, 300):
        with run.attempt(f"{scheme} kernel, {rows} rows"), torch.inference_mode():
            x = torch.randn(rows, expected.shape[1], dtype=run.dtype, device=run.device)
            error = relative_error(module(x), F.linear(x.float(), expected))
            seconds = run.device_seconds(partial(module, x))
            run.say(f"{scheme} w1, {rows} rows, beside float32", relative_error=error, us=seconds * 1e6)


def batch(run: Run) -> None:
    run.prepare()
    size = run.largest()
    for scheme, counts in ((None, (8, 32, 128)), ("int4", (8, 32)), ("int8", (8, 32))):
        name = f"{size} {scheme or dtype_name(run.dtype)}"
        if run.seconds_left < LEAST_FOR_A_MODEL and not run.rehearse:
            run.say(f"{name}: skipped, too late", seconds_left=run.seconds_left)
            continue
        with run.attempt(name):
            model = run.model(size)
            if scheme:
                quantize_model(model, scheme)
            weights = bytes_per_step(model)
            compile_decode(model)
            for rows in counts if not run.rehearse else counts[:1]:
                _measure_batch(run, model, f"{name}, {rows} rows", rows, weights)
            del model


def _measure_batch(run: Run, model: Transformer, name: str, rows: int, weights: int) -> None:
    n_tokens = run.tokens(512)
    if not _has_room(run, name, 1.2 * rows * kv_bytes(model, n_tokens + 64) + 4e9):
        return
    with run.attempt(name):
        first = decode(run, model, n_tokens, run.steps(4), batch=rows)
        run.forget_peak()
        found = decode(run, model, n_tokens, run.steps(24), batch=rows)
        n_bytes = weights + rows * kv_bytes(model, n_tokens)
        figures = found.figures(run, n_bytes) | {"first_step_ms": first.step_s[0] * 1e3, "prompt_s": found.first_s}
        run.say(name, **figures, peak_GB=run.peak_GB())


# ---- transformers on the same GPU


def peer(run: Run) -> None:
    run.prepare()
    size = run.largest()
    model = _transformers_model(run, size)
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    weights = sum(p.nbytes for p in model.parameters()) - (0 if tied else embedding.nbytes)
    for n in (512, 2048):
        with run.attempt(f"prefill {n}"), torch.inference_mode():
            ids = torch.tensor([random_ids(model.config.vocab_size, run.tokens(n))], device=run.device)
            call = partial(model, ids, use_cache=True, logits_to_keep=1)
            call()
            run.forget_peak()
            run.say(f"{size} transformers, prefill {n}", seconds=run.seconds(call), peak_GB=run.peak_GB())
    from transformers import DynamicCache, StaticCache

    n, n_steps = run.tokens(512), run.steps(32)
    ids = torch.tensor([random_ids(model.config.vocab_size, n)], device=run.device)
    eager = None
    with run.attempt("eager decode"):
        eager, times = _transformers_decode(model, model.forward, ids, DynamicCache(config=model.config), n_steps)
        ms = statistics.median(times[2:]) * 1e3
        run.say(f"{size} transformers, eager decode after 512", ms=ms, tokens_s=1e3 / ms, worst_ms=max(times) * 1e3)
    with run.attempt("compiled decode"):
        kind = {"mode": "reduce-overhead"} if run.on_cuda else {"backend": "eager"}
        fast = torch.compile(model.forward, fullgraph=True, **kind)
        cache = StaticCache(config=model.config, max_cache_len=n + n_steps + 8)
        tokens, times = _transformers_decode(model, fast, ids, cache, n_steps)
        ms = statistics.median(times[n_steps // 2 :]) * 1e3
        rate = weights / ms / 1e6
        run.say(
            f"{size} transformers, static cache, compiled",
            ms=ms,
            tokens_s=1e3 / ms,
            GB_s=rate,
            percent_of_read=100 * rate / run.read_bandwidth(),
            compile_s=sum(times[:4]),
            tokens_as_eager=agreement(tokens, eager) if eager else None,
        )


def _transformers_model(run: Run, size: str) -> Any:
    """transformers' model with its own random weights, made on the device."""
    from transformers import LlamaForCausalLM

    config = _oracles().hugging_faces_config(run.args(size), tied=release(size).tied)
    before = torch.get_default_dtype()
    torch.set_default_dtype(run.dtype)
    try:
        with torch.device(run.device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()  # like transformers' generate: its compiled step does not take inference tensors
def _transformers_decode(model: Any, step: Callable, ids: Tensor, cache: Any, n: int) -> tuple[list[int], list[float]]:
    """Greedy tokens after a prompt and the seconds of each step, transfer of the token included."""
    needs_position = "cache_position" in inspect.signature(model.forward).parameters  # older versions
    position = torch.arange(ids.shape[1], device=ids.device)
    options = {"cache_position": position} if needs_position else {}
    out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **options)
    token = out.logits[:, -1:].argmax(-1)
    position = position[-1:] + 1
    tokens, times = [], []
    for _ in range(n):
        start = time.perf_counter()
        options = {"cache_position": position.clone()} if needs_position else {}
        torch.compiler.cudagraph_mark_step_begin()
        out = step(token, past_key_values=cache, use_cache=True, **options)
        token = out.logits[:, -1:].argmax(-1).clone()
        tokens.append(int(token))
        position += 1
        times.append(time.perf_counter() - start)
    return tokens, times


# ---- parts


def first_token(run: Run) -> None:
    run.prepare()
    size = run.largest()
    model = run.model(size)
    for way in ("eager", "compiled"):
        if way == "compiled":
            with run.attempt("compile"):
                compile_decode(model)
        _first_token_seconds(run, model, run.tokens(64))
        for n in (128, 2048, 8192):
            with run.attempt(f"{size} {way}, first token after {n}"):
                new = _first_token_seconds(run, model, run.tokens(n))
                again = [_first_token_seconds(run, model, run.tokens(n)) for _ in range(3)]
                figures = {"ms": statistics.median(again) * 1e3, "new_length_ms": new * 1e3}
                run.say(f"{size} {way}, first token after {n}", **figures)


def _first_token_seconds(run: Run, model: Transformer, n: int) -> float:
    """Seconds from ids to the first token on the host, the cache's allocation included."""
    return decode(run, model, n, 1).first_s


def speculate(run: Run) -> None:
    run.prepare()
    for size in dict.fromkeys(("1B", run.largest())):
        model = run.model(size)
        for way in ("eager", "compiled"):
            with run.attempt(f"{size} {way}"):
                if way == "compiled":
                    compile_decode(model)
                _measure_passes(run, model, f"{size} {way}")
        del model
        free_memory(run.device)


def _measure_passes(run: Run, model: Transformer, name: str) -> None:
    """Measure passes over T tokens in ms, and fit PassTime's `several` and `each` to them."""
    counts = (1, 2, 4, 8, 13)
    passes = {T: _pass_ms(run, model, T) for T in counts}
    run.say(f"{name}, a pass over T tokens", **{f"ms_{T}": ms for T, ms in passes.items()})
    ratios = [passes[T] / passes[1] for T in counts[1:]]
    mean_T, mean_ratio = statistics.mean(counts[1:]), statistics.mean(ratios)
    pairs = list(zip(counts[1:], ratios, strict=True))
    each = sum((T - mean_T) * (ratio - mean_ratio) for T, ratio in pairs) / sum((T - mean_T) ** 2 for T in counts[1:])
    run.say(f"{name}, PassTime", several=mean_ratio - each * mean_T, each=each)


def _pass_ms(run: Run, model: Transformer, T: int) -> float:
    """Median time of a pass over T tokens after 500, with greedy tokens copied to the host."""
    context, times = run.tokens(500), []
    cache = new_cache(model, 1, context + 64)  # outside inference mode, as in the loop
    ids = torch.tensor([random_ids(model.args.vocab_size, T)], device=run.device)
    with torch.inference_mode():
        cache.keys.normal_()
        cache.values.normal_()
        for _ in range(run.steps(16) + 3):
            cache.truncate([context])
            times.append(run.seconds(lambda: model(ids, cache)[:, -1].argmax(-1).tolist()))
    return statistics.median(times[3:]) * 1e3


def images(run: Run) -> None:
    """The vision release's encoder, and text after an image."""
    run.prepare()
    size = "11B-Vision"
    if not run.fits(size):
        return run.say("skipped, no room for the 11B")
    model = run.model(size)
    encoder, side = model.vision_model, model.args.vision_chunk_size
    with torch.inference_mode():
        for grid in ((1, 1), (1, 2), (2, 2)):
            pixels = torch.randn(grid[0] * grid[1], 3, side, side, device=run.device, dtype=run.dtype)
            seconds = run.device_seconds(partial(encoder, pixels, grid))
            run.say(f"{size} encoder, {len(pixels)} tiles", ms=seconds * 1e3)
    photo = Tiles(torch.randn(4, 3, side, side), (2, 2))
    for way in ("eager", "compiled"):
        if way == "compiled":
            compile_decode(model)
        for shown in ((), (photo,)):
            with run.attempt(f"{size} {way}"):
                decode(run, model, run.tokens(100), run.steps(8), images=shown)
                found = decode(run, model, run.tokens(100), run.steps(32), images=shown)
                what = "after an image of 4 tiles" if shown else "without an image"
                run.say(f"{size} {way}, {what}", first_ms=found.first_s * 1e3, **found.figures(run))
    return None


def load(run: Run) -> None:
    run.prepare()
    size = _loadable(run)
    if size is None:
        run.say("skipped, no room for a checkpoint")
    else:
        with tempfile.TemporaryDirectory(prefix="llama-ref-bench-", dir=_fast_folder(run, size)) as folder:
            _write_checkpoint(run, size, Path(folder))
            for scheme in (None, "int8", "int4"):
                with run.attempt(f"{size} load {scheme or 'plain'}"):
                    _measure_load(run, size, Path(folder), scheme)
    if run.on_cuda:
        with run.attempt("copies to the card"):
            _measure_copies(run)


def _measure_load(run: Run, size: str, folder: Path, scheme: str | None) -> None:
    cpu, n_bytes = torch.device("cpu"), (folder / CHECKPOINT).stat().st_size
    load = partial(load_model, open_folder(folder), run.args(size), device=run.device, dtype=run.dtype, quantize=scheme)
    run.forget_peak()
    forget_peak(cpu)
    seconds = run.seconds(load)
    memory = {"peak_GB": run.peak_GB(), "host_peak_GB": peak_bytes(cpu) / 1e9}
    run.say(f"{size} load_model, {scheme or 'plain'}", seconds=seconds, GB_s=n_bytes / seconds / 1e9, **memory)


def _loadable(run: Run) -> str | None:
    """The largest release that fits the GPU, main memory (twice, for a copy) and a folder."""
    for size in ("8B", "3B", "1B"):
        n_bytes = _checkpoint_bytes(run, size)
        if run.rehearse or (run.fits(size) and _fast_folder(run, size) and memory_available() > 2.3 * n_bytes):
            return size
    return None


def _checkpoint_bytes(run: Run, size: str) -> int:
    return count_parameters(run.args(size), release(size).tied) * run.dtype.itemsize


def _fast_folder(run: Run, size: str) -> str | None:
    """A folder with room for the checkpoint, in memory if possible; None without one."""
    needed = 1.05 * _checkpoint_bytes(run, size) + 1e8
    folders = [folder for folder in ("/dev/shm", tempfile.gettempdir()) if Path(folder).is_dir()]
    return next((folder for folder in folders if shutil.disk_usage(folder).free > needed), None)


def _write_checkpoint(run: Run, size: str, folder: Path) -> None:
    """Write params.json and one .pth in Meta's layout; frees the model on the GPU."""
    params = {**release(size).params, **(TOY if run.rehearse else {})}
    (folder / "params.json").write_text(json.dumps(params))
    model = run.model(size)
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    if release(size).tied:
        state["output.weight"] = state["tok_embeddings.weight"]
    del model
    free_memory(run.device)
    seconds = run.seconds(lambda: torch.save(state, folder / CHECKPOINT))
    n_bytes = (folder / CHECKPOINT).stat().st_size
    run.say(f"{size} written", seconds=seconds, GB=n_bytes / 1e9, folder=str(folder.parent))


def _measure_copies(run: Run) -> None:
    """Measure copies from main memory to the GPU, from pageable and pinned memory."""
    n_bytes = 1 << 30
    pageable = torch.zeros(n_bytes, dtype=torch.uint8)
    pinned = torch.zeros(n_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(n_bytes, dtype=torch.uint8, device=run.device)
    rates = {}
    for name, source in (("pageable", pageable), ("pinned", pinned)):
        target.copy_(source)
        rates[f"{name}_GB_s"] = n_bytes / run.seconds(partial(target.copy_, source, non_blocking=True)) / 1e9
    run.say("copies to the card", **rates)


def memory(run: Run) -> None:
    """GPU memory in use after each step: total, and in tensors."""
    run.prepare()
    size = run.largest()

    def used(what: str, **figures: Any) -> None:
        run.synchronize()
        free, total = torch.cuda.mem_get_info(run.device) if run.on_cuda else (0, 0)
        run.say(what, used_GB=(total - free) / 1e9, tensors_GB=run.held_GB(), **figures)

    used("CUDA's context")
    a = torch.ones(256, 256, dtype=run.dtype, device=run.device)
    used("first matrix product", checksum=float((a @ a)[0, 0]))
    args, n_tokens = run.args(size), run.tokens(8192)
    model = run.model(size)
    used(f"{size} made")
    compile_decode(model)
    used(f"{size} compiled", **recorded(model))
    decode(run, model, run.tokens(300), run.steps(16))
    used(f"{size} first text", **recorded(model))
    for batch, context in ((1, n_tokens), (8, n_tokens // 8)):
        with run.attempt(f"{batch} x {context}"):
            free_memory(run.device)
            run.forget_peak()
            decode(run, model, context, run.steps(16), batch=batch, sampling=SAMPLED)
            planned = _planned(size, args, run.dtype, context + run.steps(16), batch)
            used(f"{size}, {batch} x {context} tokens", peak_GB=run.peak_GB(), **planned)


def _planned(size: str, args: Any, dtype: torch.dtype, n_tokens: int, batch: int) -> dict[str, float]:
    """The memory that `llama-ref plan` predicts for one GPU."""
    found = release(size)
    model = Model(found.name, found.name, args, found.tied, found.max_seq_len)
    places = plan(model, Workload(gpu_memory=80, max_seq_len=n_tokens, max_batch_size=batch), [dtype_name(dtype)])
    need = next(place.need for place in places if place.layout.processes == 1)
    parts = {"weights": need.weights, "kv_cache": need.kv_cache, "activations": need.activations, "total": need.total}
    return {f"plan_{name}_GB": value / 1e9 for name, value in parts.items()}
