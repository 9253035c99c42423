"""Compare three ways to compute patch grids: from the start, from stored residuals, by a gradient.

    python scripts/bench_patching.py [--folder checkpoints/SmolLM2-135M-Instruct] [--repeats 3]

Each grid is computed in these ways, in turn, `repeats` times. The best time of each counts, because
a busy machine slows down some rounds, not all. "From the start" runs every cell through all layers,
with as many cells in a pass as `patch_grid`.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import fire
import numpy as np
import torch

from llama_ref import study
from llama_ref.errors import LlamaRefError
from llama_ref.generation import Llama
from llama_ref.study.passes.pass_size import split_passes
from llama_ref.study.patching.cells import CellAxes
from llama_ref.study.patching.metrics import Metric, measure
from llama_ref.study.texts import Batch

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO = REPOSITORY / "checkpoints" / "SmolLM2-135M-Instruct"
CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
ANSWERS = (" Mary", " John")
GRIDS = ("layer×position", "layer×head")
T = TypeVar("T")


def main(folder: str | Path = DEMO, repeats: int = 3, dtype: str = "float32", device: str = "cpu") -> None:
    """Print the seconds of each way, their ratios, and how close the results are."""
    llama = Llama.build(folder, device=device, dtype=dtype)
    texts = (llama.encode(CLEAN), llama.encode(CORRUPTED))
    metric = study.logit_difference(*(llama.encode(answer)[-1] for answer in ANSWERS))
    print(f"{len(texts[0])} tokens, {dtype}, {torch.get_num_threads()} threads; best of {repeats}; load {load()}")
    for over in GRIDS:
        ways: list[Callable[[], np.ndarray]] = [
            lambda over=over: from_the_start(llama, *texts, metric, over),  # type: ignore[misc]
            lambda over=over: study.patch_grid(llama.model, *texts, metric, over).values,  # type: ignore[misc]
            lambda over=over: study.attribution_patch(llama.model, *texts, metric, over).values,  # type: ignore[misc]
        ]
        (whole, stored, gradient), (a, b, c) = best_of(repeats, ways)
        print(f"{over}, {a.size} cells: from the start {whole:.2f} s, stored residuals {stored:.2f} s, {whole / stored:.2f}×")
        print(f"  largest difference {np.abs(a - b).max():.2g}")
        correlation = np.corrcoef(b.ravel(), c.ravel())[0, 1]
        print(f"  gradient {gradient:.3f} s, {stored / gradient:.0f}× of exact; correlation {correlation:.2f}")
    print(f"load {load()}")


@torch.no_grad()
def from_the_start(llama: Llama, clean: list[int], corrupted: list[int], metric: Metric, over: str) -> np.ndarray:
    """The grid's values, every cell run from layer 0."""
    model = llama.model
    axes = CellAxes.for_grid(model, over, None)
    sources = study.trace(model, clean, f"layers.*.{axes.name}")
    shape = axes.shape(len(clean))
    cells = list(np.ndindex(shape))
    out = np.empty((model.args.n_layers, *shape), dtype=np.float32)
    for layer in range(model.args.n_layers):
        name = f"layers.{layer}.{axes.name}"
        for some in split_passes([len(corrupted)] * len(cells)):
            chosen = [cells[i] for i in some]

            def change(value: torch.Tensor, name: str = name, chosen: list = chosen) -> torch.Tensor:
                for cell, row in zip(chosen, value.split(1), strict=True):
                    axes.copy(cell, sources[name], row)
                return value

            batch = Batch.from_texts(model, [torch.tensor(corrupted)] * len(chosen))
            with study.patch(model, {name: change}):
                found = measure(model, batch, [metric] * len(chosen))
            out[layer].reshape(-1)[some.start : some.stop] = found.cpu().numpy()
    return out


def best_of(repeats: int, ways: list[Callable[[], T]]) -> tuple[list[float], list[T]]:
    """The shortest time and the result of each way; the ways run in turn."""
    best, results = [float("inf")] * len(ways), []
    for _ in range(repeats):
        results = []
        for i, way in enumerate(ways):
            begin = time.perf_counter()
            results.append(way())
            best[i] = min(best[i], time.perf_counter() - begin)
    return best, results


def load() -> str:
    """The load average of the last minute, and the number of cores."""
    return f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


if __name__ == "__main__":
    try:
        fire.Fire(main)
    except LlamaRefError as error:
        raise SystemExit(f"bench_patching: {error}") from None
