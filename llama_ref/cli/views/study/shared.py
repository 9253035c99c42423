"""Shared by the study commands: table cells, sentences and JSON."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from llama_ref.cli.terminal import print_rich
from llama_ref.study.inputs import label
from llama_ref.tokenizer import Tokenizer

WIDTH = 80  # columns of sentences
WIDEST_LABEL = 16  # columns
BAR = 12  # columns of the longest bar


def say(text: str, style: str = "") -> None:
    """Print a sentence below a table, wrapped to the width of most terminals."""
    print_rich(Text(textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False), style=style))


def prompt(tokens: Sequence[int], tokenizer: Tokenizer) -> Text:
    """Format the tokens of a prompt, separated by │."""
    return Text("│".join(label(tokenizer, token) for token in tokens), style="italic")


def new_table(first: str, *columns: str | Text) -> Table:
    """Return a table with a left-aligned first column and right-aligned others."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def point_name(point: str) -> str:
    """Name a point of the residual stream: layers.3.residual_post -> layer 3."""
    if "." not in point:
        return point
    within = "within " if point.endswith("residual_mid") else ""
    return f"{within}layer {point.split('.')[1]}"


def elastic(text: str, style: str = "") -> Text:
    """Return a cell that is cut if the table is too wide."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def cut(text: str) -> str:
    """Cut a token's text to WIDEST_LABEL letters."""
    return text if len(text) <= WIDEST_LABEL else text[: WIDEST_LABEL - 1] + "…"


def bar(value: float, longest: float) -> Text:
    """Draw a share as a bar: solid green above 0, light red below; empty for NaN."""
    length = round(BAR * abs(value) / longest) if longest and math.isfinite(value) else 0
    return Text("█" * length, style="green") if value > 0 else Text("░" * length, style="red")


def percent(share: Tensor | float) -> str:
    """Format a share: 0.62 -> 62%; below 0.05%, as 3e-06."""
    share = float(share)
    if math.isnan(share):
        return "–"
    if share >= 0.0995 or share == 0:
        return f"{share:.0%}"
    return f"{share:.1%}" if share >= 0.0005 else f"{share:.0e}"


def number(value: Tensor | float) -> str:
    """Format a number with two decimals; a dash for NaN."""
    return "–" if math.isnan(value) else f"{float(value):.2f}"


def signed(value: float) -> str:
    """Format a number with two decimals and a sign."""
    return f"{value:+.2f}"


def tokens_json(tokens: Iterable[int], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return `token_json` of each token."""
    return [token_json(token, tokenizer) for token in tokens]


def token_json(token: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a token's id, and its text as tables show it."""
    return {"id": token, "text": label(tokenizer, token)}


def plain(values: Tensor) -> Any:
    """Return a tensor's numbers for JSON, with null for NaN and infinity."""
    return finite(values.tolist())


def finite(values: Any) -> Any:
    """Replace NaN and infinity by None in nested lists and mappings."""
    if isinstance(values, list):
        return [finite(value) for value in values]
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    return None if isinstance(values, float) and not math.isfinite(values) else values
