"""Helpers for the stages of bench_cuda.py: figures, timers, random models, timed decoding."""

import contextlib
import gc
import itertools
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama_ref import device as devices
from llama_ref.args import ModelArgs
from llama_ref.checkpoint.loading.empty_model import model_without_memory
from llama_ref.checkpoint.releases import Release, find_release
from llama_ref.compiled.caches import new_cache
from llama_ref.decoding.loop import prefill, steps
from llama_ref.decoding.row import Row
from llama_ref.images import Tiles
from llama_ref.machine.memory import free_bytes
from llama_ref.model import Transformer
from llama_ref.plan import count_parameters
from llama_ref.sampling import Sampler, SamplingParams
from llama_ref.vision import VisionTransformer

RELEASES = {"8B": "Llama3.1-8B", "3B": "Llama3.2-3B", "1B": "Llama3.2-1B"}  # largest first
VISION = {"11B-Vision": "Llama3.2-11B-Vision-Instruct"}
TOY = {"dim": 256, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 1000, "multiple_of": 256}
TOY_VISION = {
    "vision_chunk_size": 56,
    "vision_num_cross_attention_layers": 1,
    "vision_dim": 128,
    "vision_n_layers": 6,
    "vision_n_global_layers": 2,
    "vision_kept_layers": [1, 3, 4],
}
HEADROOM = 2e9  # bytes besides the weights: CUDA's context, activations, a short cache
GREEDY = SamplingParams(temperature=0)


def write_figures(out: Path, stage: str, what: str, at: float, **figures: Any) -> None:
    """Print a line of figures and append it to results.jsonl; `at`: seconds since the start."""
    short = {name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in figures.items()}
    print(f"{at:6.1f} s  {figures_line(stage, what, short)}", flush=True)
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps({"stage": stage, "what": what, **short}) + "\n")


def figures_line(stage: str, what: str, figures: dict[str, Any]) -> str:
    shown = "  ".join(f"{name}={value}" for name, value in figures.items() if value is not None)
    return f"{stage:11} {what:44} {shown}"


class Run:
    """One stage: its device, its output folder and its time limit.

    `rehearse` replaces every shape by a toy one. `deadline` is the time.time() at which the stage
    is stopped.
    """

    def __init__(self, stage: str, device: str, rehearse: bool, out: Path, deadline: float):
        self.stage, self.rehearse, self.out, self.deadline = stage, rehearse, out, deadline
        self.start = time.time()
        self.device = torch.device(device)
        self.on_cuda = self.device.type == "cuda"
        self.dtype = devices.choose_dtype(None, self.device)
        if self.rehearse:
            torch.set_num_threads(1)

    def prepare(self) -> None:
        """Set CUDA up as the project does: without cuDNN's attention, which plans per shape."""
        devices.prepare_cuda(self.device)

    # ---- figures

    def say(self, what: str, **figures: Any) -> None:
        write_figures(self.out, self.stage, what, time.time() - self.start, **figures)

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Run a measurement; a failure is printed, its traceback goes to errors.txt."""
        try:
            yield
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0]
            self.say(f"{what} FAILED", error=f"{type(error).__name__}: {first_line}"[:200])
            with (self.out / "errors.txt").open("a") as file:
                file.write(f"== {self.stage}: {what}\n{traceback.format_exc()}\n")
        finally:
            free_memory(self.device)

    def figure(self, stage: str, what: str, name: str) -> Any:
        """The last figure of that name in this run, or None."""
        file = self.out / "results.jsonl"
        lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
        found = [line[name] for line in lines if (line["stage"], line["what"]) == (stage, what) and name in line]
        return found[-1] if found else None

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.time()

    # ---- sizes

    def tokens(self, n: int) -> int:
        """A number of tokens, or a few in a rehearsal."""
        return 8 + n // 4096 if self.rehearse else n

    def steps(self, n: int) -> int:
        return min(n, 4) if self.rehearse else n

    def args(self, size: str, **changes: Any) -> ModelArgs:
        """Model args of "8B", "3B", "1B" or "11B-Vision", or a toy's in a rehearsal."""
        toy = TOY | (TOY_VISION if size in VISION else {}) if self.rehearse else {}
        return ModelArgs.from_dict({**release(size).params, **changes, **toy})

    def free_bytes(self) -> float:
        return torch.cuda.mem_get_info(self.device)[0] if self.on_cuda else memory_available()

    def fits(self, size: str, *, more_bytes: float = 0.0) -> bool:
        parameters = count_parameters(self.args(size), release(size).tied)
        return self.rehearse or self.free_bytes() > parameters * self.dtype.itemsize + HEADROOM + more_bytes

    def largest(self) -> str:
        """The largest release whose unquantized weights fit the device; the 1B on a CPU."""
        sizes = RELEASES if self.on_cuda or self.rehearse else ("1B",)
        return next((size for size in sizes if self.fits(size)), "1B")

    def model(self, size: str, dtype: torch.dtype | None = None, **changes: Any) -> Transformer:
        """A model with random weights in a release's shape, made on the device in seconds."""
        model = model_without_memory(self.args(size, **changes))
        model = model.to(dtype or self.dtype).to_empty(device=self.device).requires_grad_(False).eval()
        if release(size).tied:
            model.output.weight = model.tok_embeddings.weight
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.9, 1.1)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
        return model

    # ---- timers and memory

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any]) -> float:
        """Seconds of one call until the device has finished, host time included."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def device_seconds(self, call: Callable[[], Any], calls: int = 5) -> float:
        """Median seconds of a call on the device, by CUDA events, after two warm-up calls."""
        for _ in range(2):
            call()
        if not self.on_cuda:
            return statistics.median(self.seconds(call) for _ in range(calls))
        times = []
        for _ in range(calls):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)

    def forget_peak(self) -> None:
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_GB(self) -> float | None:
        """Peak GPU memory in tensors since `forget_peak`."""
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.on_cuda else None

    def held_GB(self) -> float | None:
        return torch.cuda.memory_allocated(self.device) / 1e9 if self.on_cuda else None

    def read_bandwidth(self) -> float:
        """GB/s at which the device reads a large float32 matrix; measured once per run."""
        known = self.figure("env", "read bandwidth", "GB_s")
        return known if known else self.measure_read_bandwidth()

    def measure_read_bandwidth(self) -> float:
        n_bytes = 1 << 22 if self.rehearse else int(min(1 << 32, self.free_bytes() / 4))
        matrix = torch.ones(4096, n_bytes // 4 // 4096, device=self.device)
        return matrix.nbytes / self.device_seconds(lambda: matrix.sum(-1)) / 1e9

    def profile(self, name: str, call: Callable[[], Any]) -> None:
        """Write a table of a call's operators and kernels, slowest first, to profile_<name>.txt."""
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_cuda else [])]
        with self.attempt(f"profile {name}"):
            with profile(activities=kinds) as profiler:
                call()
                self.synchronize()
            key = "self_cuda_time_total" if self.on_cuda else "self_cpu_time_total"
            table = profiler.key_averages().table(sort_by=key, row_limit=50, max_name_column_width=80)
            (self.out / f"profile_{name}.txt").write_text(table)
            self.say(f"profile {name}", file=f"profile_{name}.txt")


def release(size: str) -> Release:
    return find_release((RELEASES | VISION)[size])


def free_memory(device: torch.device) -> None:
    """Release unused GPU memory."""
    if device.type == "cuda":
        gc.collect()  # tensors of a failed measurement are in a reference cycle with its traceback
        torch.cuda.empty_cache()


def memory_available() -> int:
    """Bytes of main memory that are free or in caches; 0 if the system does not report it."""
    return free_bytes(torch.device("cpu")) or 0


def bytes_per_step(model: Transformer) -> int:
    """Bytes of weights that a decode step reads: not the embedding, unless it is tied."""
    held = {
        tensor.data_ptr(): tensor.nbytes
        for module in model.modules()
        if module is not model.tok_embeddings
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    return sum(held.values())


def kv_bytes(model: Transformer, n_tokens: int) -> int:
    """Bytes of the keys and values of `n_tokens` tokens."""
    args = model.args
    itemsize = model.norm.weight.dtype.itemsize
    return n_tokens * 2 * args.n_layers * args.n_kv_heads * args.head_dim * itemsize


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference divided by the norm of `expected`, in float32."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def random_ids(vocab_size: int, n: int, seed: int = 0) -> list[int]:
    return torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


# ---- timed decoding


@dataclass
class Decoding:
    """Seconds to the first token and of each later step; the tokens of every row."""

    first_s: float
    step_s: list[float]
    tokens: list[list[int]]

    @property
    def ms(self) -> float:
        return statistics.median(self.step_s) * 1e3

    @property
    def worst_ms(self) -> float:
        return max(self.step_s) * 1e3

    def figures(self, run: Run, n_bytes: float | None = None) -> dict[str, Any]:
        """Times and rates; with `n_bytes` per step, also GB/s and percent of the bandwidth."""
        found = {"ms": self.ms, "tokens_s": len(self.tokens) * 1e3 / self.ms, "worst_ms": self.worst_ms}
        if n_bytes:
            rate = n_bytes / self.ms / 1e6
            found |= {"GB_s": rate, "percent_of_read": 100 * rate / run.read_bandwidth()}
        return found


def decode(
    run: Run,
    model: Transformer,
    context: int,
    n: int,
    *,
    batch: int = 1,
    filled: bool = False,
    sampling: SamplingParams = GREEDY,
    images: Sequence[Tiles] = (),
) -> Decoding:
    """Generate n tokens after `context` random ones with the project's loop.

    `filled`: start with random keys and values in the cache of one row, to skip a long prefill.
    `images` come before the prompts of a vision model.
    """
    vocab_size = model.args.vocab_size
    before = [model.image_id for _ in images] if isinstance(model, VisionTransformer) else []
    rows = [Row(before + random_ids(vocab_size, context, seed), n, images) for seed in range(batch)]
    generator = torch.Generator().manual_seed(0)
    sampler = Sampler(sampling, generator, [row.prompt for row in rows], vocab_size, run.device)
    cache = None
    if filled:
        cache = new_cache(model, 1, context + n)
        with torch.inference_mode():
            cache.keys.normal_()
            cache.values.normal_()
        cache.truncate([context - 1])
    run.synchronize()
    times = [time.perf_counter()]
    for _ in steps(model, rows, sampler, (), cache=cache):
        times.append(time.perf_counter())
    first, *others = [b - a for a, b in itertools.pairwise(times)]
    return Decoding(first, others, [row.generated for row in rows])


def prefill_seconds(run: Run, model: nn.Module, n: int, batch: int = 1) -> float:
    """Seconds of the prefill of n tokens, without the cache's allocation."""
    rows = [Row(random_ids(model.args.vocab_size, n, seed), 1) for seed in range(batch)]
    cache = new_cache(model, batch, n + 1)
    return run.seconds(lambda: prefill(model, rows, cache, False))


def agreement(a: list[int], b: list[int]) -> str:
    """Length of the common prefix, such as "24 of 24"."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return f"{same} of {len(a)}"


def recorded(model: Transformer) -> dict[str, Any]:
    """Number of graphs that a compiled model has captured, and the seconds it took."""
    fast = model.forward
    recordings = getattr(fast, "recordings", None)
    return {
        "recordings": None if recordings is None else len(recordings),
        "record_s": getattr(fast, "record_seconds", None),
    }
