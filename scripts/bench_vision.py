"""Compare the vision encoder with Meta's at full width, on random weights: speed and outputs.

    python scripts/bench_vision.py [--size 560] [--dtype bfloat16] [--rounds 3]

There is one image for each number of tiles. Ours and Meta's take turns; each figure is the median
of its rounds. Needs llama-models and fairscale.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Annotated

import torch
from fairscale.nn.model_parallel import initialize as model_parallel
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.releases import find_release
from llama_ref.cli.parsing.flags import Flag
from llama_ref.cli.parsing.parser import command, run
from llama_ref.cli.shared.options import Dtype
from llama_ref.device import DTYPES
from llama_ref.vision import Grid, VisionEncoder
from metas_vision import model as metas

GRIDS = ((1, 1), (1, 2), (1, 3), (2, 2))
SCALE = 0.02  # of the weights: states stay finite in every dtype


@command()
def main(
    *,
    size: Annotated[int, Flag("pixels of a tile's side")] = 560,
    dtype: Dtype = "bfloat16",
    rounds: Annotated[int, Flag("number of measurements of each")] = 3,
) -> None:
    """Compare the vision encoder with Meta's, on random weights: speed and outputs."""
    release = find_release("Llama3.2-11B-Vision-Instruct")
    measure(ModelArgs.from_dict({**release.params, "vision_chunk_size": size}), dtype, rounds)


def measure(args: ModelArgs, dtype: str, rounds: int) -> None:
    """Print, for each number of tiles, our and Meta's seconds and the difference of the outputs."""
    size = args.vision_chunk_size
    assert size is not None
    ours, theirs = _encoders(args, DTYPES[dtype])
    n_threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {n_threads} threads, {dtype}, tiles of {size} × {size} pixels, {rounds} rounds")
    print("tiles  ours       Meta's     ours / Meta's  largest difference / std")
    for grid in GRIDS:
        tiles = torch.randn(grid[0] * grid[1], 3, size, size).to(DTYPES[dtype])
        runs = {"ours": lambda t=tiles, g=grid: ours(t, g), "theirs": lambda t=tiles, g=grid: _run_metas(theirs, t, g)}
        taken, outputs = _take_turns(runs, rounds)
        apart = ((outputs["ours"] - outputs["theirs"]).abs().max() / outputs["theirs"].float().std()).item()
        ratio = taken["ours"] / taken["theirs"]
        print(f"{len(tiles):<6} {taken['ours']:<7.2f} s  {taken['theirs']:<7.2f} s  {ratio:<14.2f} {apart:.1e}", flush=True)


def _encoders(args: ModelArgs, dtype: torch.dtype) -> tuple[VisionEncoder, "metas.VisionEncoder"]:
    """Ours and Meta's on the same random weights."""
    torch.manual_seed(0)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        model_parallel.initialize_model_parallel(1)
    with torch.device("meta"):
        ours = VisionEncoder(args)
    weights = {name: SCALE * torch.randn(p.shape, dtype=dtype) for name, p in ours.named_parameters()}
    for name, weight in weights.items():
        if "ln_" in name and name.endswith("weight"):
            weight += 1
        if "gate" in name and weight.numel() == 1:
            weight += 0.5
    ours.load_state_dict(weights, assign=True)
    theirs = metas.VisionEncoder(
        args.vision_max_num_chunks,
        width=args.vision_dim,
        layers=args.vision_n_layers,
        image_size=args.vision_chunk_size,
        n_global_layers=args.vision_n_global_layers,
        global_model=True,
        return_intermediate=list(args.vision_kept_layers),
    )
    theirs.load_state_dict(dict(weights), assign=True)
    return ours.requires_grad_(False), theirs.requires_grad_(False)


def _run_metas(encoder: "metas.VisionEncoder", tiles: Tensor, grid: Grid) -> Tensor:
    stacked = tiles.new_zeros(1, 1, encoder.max_num_tiles, *tiles.shape[1:])
    stacked[0, 0, : len(tiles)] = tiles
    return encoder(stacked, torch.tensor([[list(grid)]]))[0, 0, : len(tiles)].flatten(0, 1)


@torch.inference_mode()
def _take_turns(runs: dict[str, Callable[[], Tensor]], rounds: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Median seconds of each, in turn, and the outputs."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    outputs = {}
    for _ in range(rounds):
        for name, compute in runs.items():
            begin = time.perf_counter()
            outputs[name] = compute()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}, outputs


if __name__ == "__main__":
    sys.exit(run(main))
