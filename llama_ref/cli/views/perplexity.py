"""What `llama-ref perplexity` prints."""

import json
from dataclasses import asdict, dataclass

from rich import box
from rich.table import Column, Table
from rich.text import Text

from llama_ref.cli.terminal import print_rich
from llama_ref.evaluation.perplexity import Perplexity
from llama_ref.evaluation.texts import TextFile
from llama_ref.evaluation.windows import Cut
from llama_ref.formatting import printable


@dataclass(frozen=True)
class Measured:
    """One model's figures on one text."""

    model: str
    dtype: str
    bos_id: int
    text: TextFile
    figures: Perplexity


def print_perplexities(found: list[Measured], cut: Cut, *, as_json: bool) -> None:
    """Print the figures and how they were measured: a table, or JSON."""
    if as_json:
        print(json.dumps({**asdict(cut), "results": [_as_json(each) for each in found]}, indent=2))
        return
    several = len({each.text.path for each in found}) > 1
    names = ("perplexity", "bits/byte", "tokens", "windows")
    columns = [Column("model", overflow="fold"), *([Column("text", overflow="fold")] if several else [])]
    table = Table(*columns, *(Column(name, justify="right", no_wrap=True) for name in names), box=box.SIMPLE_HEAD)
    for each in found:
        figures = each.figures
        table.add_row(
            Text(each.model),
            *([Text(each.text.path)] if several else []),
            f"{figures.perplexity:,.3f}",
            f"{figures.bits_per_byte:.4f}",
            f"{figures.tokens:,}",
            f"{figures.windows:,}",
        )
    print_rich(table)
    for line in _head(found, cut):
        print(printable(line))


def _head(found: list[Measured], cut: Cut) -> list[str]:
    """Lines that say how the figures were measured: others are not comparable."""
    if cut.convention == "hf":
        how = f"hf: windows of {cut.context:,} tokens, one every {cut.stride:,}, begin-of-text before the text"
    else:
        how = f"llama.cpp: windows of {cut.context:,} tokens, their second halves scored, begin-of-text first in each"
    dtypes = ", ".join(dict.fromkeys(each.dtype for each in found))
    files = dict.fromkeys(f"{each.text.path}: {each.text.n_bytes:,} bytes, sha256 {each.text.sha256[:12]}" for each in found)
    return [f"{how}; {dtypes}", *files]


def _as_json(each: Measured) -> dict[str, object]:
    file = {"path": each.text.path, "bytes": each.text.n_bytes, "sha256": each.text.sha256}
    return {"model": each.model, "dtype": each.dtype, "bos_id": each.bos_id, "file": file, **asdict(each.figures)}
