"""What `llama-ref verify`, `checksum` and `diff` print."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from llama_ref.checkpoint.compare import Comparison
from llama_ref.checkpoint.report import FileReport, Report, human_bytes, printable
from llama_ref.views import print_rich

MOST_TENSORS = 12  # differing tensors shown
SUM_SHOWN = 8  # leading hex digits: enough to see that two differ


def print_reports(reports: list[Report], *, as_json: bool, as_list: bool = False) -> None:
    """A table and a last line for each folder; as JSON, an object for the only folder, or `as_list`, however many they are."""
    if as_json:
        texts = [report.to_json() for report in reports]
        print(json.dumps([json.loads(text) for text in texts], indent=2) if as_list else texts[0])
        return
    for report in reports:
        if report.files:
            print_rich(_table(report))
        for note in report.notes:
            print_rich(Text(f"note: {printable(note)}"))
        color = "green" if report.ok else "red" if report.bad else "yellow"
        print_rich(Text(printable(report.summary()), style=color))


def _table(report: Report) -> Table:
    table = Table(title=printable(str(report.folder)), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("file", no_wrap=True)
    # 80 columns are enough for a release's names: where they are scarce, cells break at spaces, as "197 bytes" may.
    table.add_column("size", justify="right", min_width=len("16.1 GB"))
    table.add_column("expected", min_width=SUM_SHOWN)
    table.add_column("found", no_wrap=True)
    table.add_column("state", min_width=max(len(word) for file in report.files for word in str(file.state).split()))
    table.add_column("speed", justify="right", no_wrap=True, min_width=len("1.23 GB/s"))
    for file in report.files:
        table.add_row(*_cells(file))
    return table


def _cells(file: FileReport) -> Iterator[str | Text]:
    yield printable(file.name)
    yield "" if file.size is None else human_bytes(file.size)
    yield _expected(file)
    yield (file.found_sum or "")[:SUM_SHOWN]
    yield Text(str(file.state), style="green" if file.ok else "red")
    yield f"{human_bytes(file.bytes_per_second)}/s" if file.bytes_per_second else ""


def _expected(file: FileReport) -> str:
    """The sum's beginning; the size too, where that is what is wrong."""
    size = human_bytes(file.expected_size) if file.expected_size not in (None, file.size) else ""
    return " ".join(part for part in ((file.expected_sum or "")[:SUM_SHOWN], size) if part)


@contextmanager
def hashing_bars() -> Iterator[Callable[[Path, int, int], None]]:
    """A bar per file on stderr while it is read; silent where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    tasks: dict[Path, TaskID] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:

        def progress(path: Path, done: int, total: int) -> None:
            if path not in tasks:
                tasks[path] = bars.add_task(escape(printable(path.name)), total=total)
            bars.update(tasks[path], completed=done)

        yield progress


def print_comparison(comparison: Comparison, *, as_json: bool) -> None:
    """`identical`, or what differs: params, tokenizer, and the first tensors with their distances."""
    if as_json:
        print(comparison.to_json())
        return
    if comparison.identical:
        print(f"identical: {comparison.n_tensors} tensors, params.json and tokenizer")
        return
    print(f"a: {printable(comparison.a)}\nb: {printable(comparison.b)}")
    for line in comparison.params:
        print(f"params.json: {line}")
    if comparison.tokenizer:
        print(f"tokenizer.model: {comparison.tokenizer}")
    if comparison.tensors:
        print_rich(_differences(comparison))


def _differences(comparison: Comparison) -> Table:
    n, shown = len(comparison.tensors), comparison.tensors[:MOST_TENSORS]
    caption = f"and {n - len(shown)} more" if n > len(shown) else None
    table = Table(
        title=f"{n} of {comparison.n_tensors} tensors differ", title_justify="left", caption=caption, box=box.SIMPLE_HEAD
    )
    for column in ("tensor", "difference", "largest", "|a - b| / |a|", "values"):
        table.add_column(column, overflow="fold")
    for tensor in shown:
        numbers = [] if tensor.max_abs is None else [f"{tensor.max_abs:.3g}", f"{tensor.relative_norm:.3g}"]
        counted = [] if tensor.n_different is None else [f"{tensor.n_different:,}"]
        table.add_row(printable(tensor.name), tensor.what, *numbers, *counted)
    return table
