"""What `llama-ref patch` prints."""

import json
import math
from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from llama_ref.cli.terminal import output_console, print_rich
from llama_ref.cli.views.study.shared import finite, prompt, say, token_json, tokens_json
from llama_ref.study.inputs import label
from llama_ref.study.patching.grid import Grid
from llama_ref.tokenizer import Tokenizer

CELL, GAP = 5, 2  # columns of a grid's cell, and between two


def print_grid(
    grid: Grid,
    clean: Sequence[int],
    corrupted: Sequence[int],
    tokenizer: Tokenizer,
    target: int,
    other: int | None,
    *,
    as_json: bool,
) -> None:
    """Print how much of the metric each patched cell restores, in percent."""
    metric = f"probability of {label(tokenizer, target)}"
    if other is not None:
        metric = f"logit of {label(tokenizer, target)} above {label(tokenizer, other)}"
    if as_json:
        found = {
            "clean_tokens": tokens_json(clean, tokenizer),
            "corrupted_tokens": tokens_json(corrupted, tokenizer),
            "target": token_json(target, tokenizer),
            "other": None if other is None else token_json(other, tokenizer),
            "metric": metric,
        }
        print(json.dumps(found | finite(grid.to_json()), indent=2))
        return
    for name, tokens, value in (("clean", clean, grid.clean), ("corrupted", corrupted, grid.corrupted)):
        print_rich(Text(f"{name}: ") + prompt(tokens, tokenizer))
        print_rich(Text(f"    {metric}: {value:.4g}"))
    heads = grid.labels[1]
    if grid.axes[1] == "position":
        heads = [_column_label(label(tokenizer, token)) for token in corrupted]
    restored = grid.restored.tolist()
    width = max(1, (output_console().width - CELL - 1) // (CELL + GAP) - 1)  # cells that a line holds beside the layer
    for start in range(0, len(heads), width):
        print_rich(_grid_table(grid, restored, heads, range(start, min(start + width, len(heads)))))
    say(f"Each cell takes {grid.name} from the clean run. Numbers: percent of the difference restored.")
    say(_best_cells(grid, restored, heads), "green")


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
    """A share in percent, highlighted if it is large."""
    if not math.isfinite(share):
        return Text("–")
    style = "black on green" if share >= 0.5 else "green" if share >= 0.1 else "red" if share <= -0.1 else "dim"
    return Text(f"{round(100 * share)}", style=style)


def _column_label(text: str) -> str:
    text = text.removeprefix("␣")
    shown = Text(text)
    shown.truncate(CELL, overflow="ellipsis")  # in columns: a Korean letter takes two
    return shown.plain


def _best_cells(grid: Grid, restored: list[list[float]], heads: Sequence[str]) -> str:
    cells = [(share, layer, column) for layer, row in enumerate(restored) for column, share in enumerate(row)]
    best = sorted((cell for cell in cells if not math.isnan(cell[0])), reverse=True)[:3]
    if not best:
        if not math.isfinite(grid.clean - grid.corrupted):
            return "There is nothing to compare: numbers are not finite. Look for NaN in the weights (llama-ref verify --deep)."
        return "Both texts give the same value: there is no difference to restore."
    where = "{}@{}" if grid.axes[1] == "position" else "head {}"
    return "Most: " + "; ".join(
        f"layer {grid.labels[0][layer]}, {where.format(heads[column], column)} {100 * share:.0f}%"
        for share, layer, column in best
    )
