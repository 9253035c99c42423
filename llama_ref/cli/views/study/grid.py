"""What `llama-ref patch` prints."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict

from rich import box
from rich.table import Table
from rich.text import Text

from llama_ref.cli.terminal import output_console, print_rich
from llama_ref.cli.views.study.shared import finite, number, prompt, say, token_json, tokens_json
from llama_ref.study.inputs import label
from llama_ref.study.patching.grid import Grid, GridPair
from llama_ref.tokenizer import Tokenizer

CELL, GAP = 5, 2  # width of a cell and of the gap between two, in columns
BEST = 12  # cells shown for a grid with three axes


def print_grids(pair: GridPair, tokenizer: Tokenizer, *, as_json: bool) -> None:
    """Print how much of the metric each patched cell restores, in percent: exact, estimated, or both."""
    metric = f"{pair.measure} of {label(tokenizer, pair.target)}"
    if pair.other is not None:
        metric = f"logit of {label(tokenizer, pair.target)} above {label(tokenizer, pair.other)}"
    agreement, grids = pair.agreement, pair.grids
    if as_json:
        found = {
            "clean_tokens": tokens_json(pair.clean, tokenizer),
            "corrupted_tokens": tokens_json(pair.corrupted, tokenizer),
            "noise": None if pair.noise is None else asdict(pair.noise),
            "target": token_json(pair.target, tokenizer),
            "other": None if pair.other is None else token_json(pair.other, tokenizer),
            "metric": metric,
            "by": "exact" if pair.exact is not None else "gradient",
        }
        found |= grids[0].to_json()
        if agreement is not None and pair.estimate is not None:
            found["estimate"] = {"values": pair.estimate.values.tolist(), **asdict(agreement)}
        print(json.dumps(finite(found), indent=2))
        return
    print_rich(Text("clean: ") + prompt(pair.clean, tokenizer))
    print_rich(Text(f"    {metric}: {grids[0].clean:.4g}"))
    print_rich(_corrupted(pair, tokenizer))
    print_rich(Text(f"    {metric}: {grids[0].corrupted:.4g}"))
    for grid in grids:
        if len(grids) > 1:
            say("By the gradient:" if grid is pair.estimate else "Exact:")
        _print_grid(grid, pair.corrupted, tokenizer, is_estimate=grid is pair.estimate)
    if agreement is not None:
        gap = abs(grids[0].clean - grids[0].corrupted)
        largest = f"{100 * agreement.largest_difference / gap:.0f}%" if gap else "–"
        say(f"Estimate and exact: correlation {number(agreement.correlation)}, largest difference {largest}.")


def _corrupted(pair: GridPair, tokenizer: Tokenizer) -> Text:
    """Format the corrupted text, or the tokens with noise."""
    if pair.noise is None:
        return Text("corrupted: ") + prompt(pair.corrupted, tokenizer)
    tokens = ", ".join(f"{label(tokenizer, pair.clean[position])}@{position}" for position in pair.noise.positions)
    n = len(pair.noise.seeds)
    return Text(f"with noise on {tokens}: {pair.noise.scale:g} standard deviations of the embedding, mean of {n} runs")


def _print_grid(grid: Grid, corrupted: Sequence[int], tokenizer: Tokenizer, *, is_estimate: bool) -> None:
    heads = grid.labels[1]
    if grid.axes[1] == "position":
        heads = [_column_label(label(tokenizer, token)) for token in corrupted]
    if len(grid.axes) == 2:
        restored = grid.restored.tolist()
        # cells per line, after the layer's column
        width = max(1, (output_console().width - CELL - 1) // (CELL + GAP) - 1)
        for start in range(0, len(heads), width):
            print_rich(_grid_table(grid, restored, heads, range(start, min(start + width, len(heads)))))
    what = "is estimated with" if is_estimate else "takes"
    say(f"Each cell {what} {grid.name} from the clean run. Numbers: percent of the difference restored.")
    say(_best_cells(grid, heads, 3 if len(grid.axes) == 2 else BEST), "green")


def _grid_table(grid: Grid, restored: list[list[float]], heads: Sequence[str], columns: range) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(Text(grid.axes[0]), no_wrap=True, justify="right")
    for column in columns:
        head = f"{heads[column]}\n@{column}" if grid.axes[1] == "position" else f"h{heads[column]}"
        table.add_column(Text(head), no_wrap=True, justify="right", width=CELL)
    for layer, row in zip(grid.labels[0], restored, strict=True):
        table.add_row(layer, *(_shaded(row[column]) for column in columns))
    return table


def _shaded(share: float) -> Text:
    """Format a share in percent, highlighted if it is large."""
    if not math.isfinite(share):
        return Text("–")
    style = "black on green" if share >= 0.5 else "green" if share >= 0.1 else "red" if share <= -0.1 else "dim"
    return Text(f"{round(100 * share)}", style=style)


def _column_label(text: str) -> str:
    text = text.removeprefix("␣")
    shown = Text(text)
    shown.truncate(CELL, overflow="ellipsis")  # a Korean letter is two columns wide
    return shown.plain


def _best_cells(grid: Grid, heads: Sequence[str], n: int) -> str:
    best = grid.best_cells(n)
    if not best:
        if not math.isfinite(grid.clean - grid.corrupted):
            return "There is nothing to compare: numbers are not finite. Look for NaN in the weights (llama-ref verify --deep)."
        return "Both texts give the same value: there is no difference to restore."
    return "Most: " + "; ".join(f"{grid.cell_name(index, heads)} {100 * share:.0f}%" for share, index in best)
