"""What `llama-ref verify`, `checksum` and `diff` print."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from llama_ref.checkpoint.verify.report import FileReport, Report, State
from llama_ref.cli.terminal import live_progress, print_rich
from llama_ref.formatting import human_bytes, printable

if TYPE_CHECKING:
    from llama_ref.checkpoint.diff import Comparison  # a type: verify does not wait for torch

MOST_TENSORS = 12  # differing tensors shown
SUM_SHOWN = 8  # leading hex digits: enough to see that two differ
NARROW = 80  # columns of a narrow terminal
LEAST_TIMED_BYTES = 1 << 20  # reading a smaller file does not measure the disk


def print_reports(reports: list[Report], *, as_json: bool, as_list: bool = False) -> None:
    """Print a table and a summary per folder, and a total; as JSON, an object or a list."""
    if as_json:
        texts = [report.to_json() for report in reports]
        print(json.dumps([json.loads(text) for text in texts], indent=2) if as_list else texts[0])
        return
    for number, report in enumerate(reports):
        if number:
            print()
        if report.files:
            print_rich(Text(printable(str(report.folder)), style="italic"))  # a table's title would be wrapped
            print_rich(_table(report))
        for note in report.notes:
            print_rich(Text(f"note: {printable(note)}"))
        color = "green" if report.ok else "red" if report.bad else "yellow"
        print_rich(Text(printable(report.summary()), style=color))
    if len(reports) > 1:
        print()
        print_rich(_total(reports))


def _total(reports: list[Report]) -> Text:
    """Summarize how many folders are complete, and which are not."""
    bad = [report for report in reports if report.bad]
    unknown = [report for report in reports if not report.ok and not report.bad]
    n_good = len(reports) - len(bad) - len(unknown)
    good = "whole" if all(file.state is State.WHOLE for report in reports if report.ok for file in report.files) else "sound"
    parts = [f"{n_good} of {len(reports)} folders are {good}"]
    if bad:
        parts.append(f"not {good}: {_names(bad)}")
    if unknown:
        parts.append(f"not checked in full: {_names(unknown)}")
    return Text("; ".join(parts), style="red" if bad else "yellow" if unknown else "green")


def _names(reports: list[Report]) -> str:
    paths = [report.folder for report in reports]
    return printable(", ".join(path.parent.name if path.name == "original" else path.name for path in paths))


def _table(report: Report) -> Table:
    """Make the table of files, without empty columns; without speeds if over 80 columns."""
    columns: dict[str, list[str | Text]] = {
        "file": [printable(file.name) for file in report.files],
        "size": ["" if file.size is None else human_bytes(file.size) for file in report.files],
        "expected": [_expected(file) for file in report.files],
        "found": [(file.found_sum or "")[:SUM_SHOWN] for file in report.files],
        "state": [Text(str(file.state), style="green" if file.ok else "red") for file in report.files],
        "speed": [_speed(file) for file in report.files],
    }
    if columns["found"] == columns["expected"]:
        columns["sum"] = columns.pop("found")
        del columns["expected"]
    shown = [name for name in ("file", "size", "expected", "found", "sum", "state", "speed") if any(columns.get(name, []))]
    if "speed" in shown and _needed_width(columns, shown) > NARROW:
        shown.remove("speed")
    table = Table(box=box.SIMPLE_HEAD)
    for name in shown:
        table.add_column(name, **_options(name, columns))
    for row in zip(*(columns[name] for name in shown), strict=True):
        table.add_row(*row)
    return table


def _options(name: str, columns: Mapping[str, list[str | Text]]) -> dict[str, Any]:
    """Layout of a column. Cells without `no_wrap` may break at their spaces ("197 bytes")."""
    if name == "size":
        return {"justify": "right", "min_width": len("16.1 GB")}
    if name == "speed":
        return {"justify": "right", "no_wrap": True, "min_width": len("1.23 GB/s")}
    if name == "state":
        return {"min_width": max(len(word) for state in columns["state"] for word in str(state).split())}
    return {"min_width": SUM_SHOWN} if name == "expected" else {"no_wrap": True}


def _needed_width(columns: Mapping[str, list[str | Text]], shown: list[str]) -> int:
    """Width of the narrowest table that cuts nothing, in columns."""
    widest = {name: max(len(str(cell)) for cell in columns[name]) for name in shown}
    least = {name: _options(name, columns).get("min_width", widest[name]) for name in shown}
    return sum(least.values()) + 3 * len(shown) - 1  # spaces around each cell, and one between cells


def _expected(file: FileReport) -> str:
    """The start of the expected sum, and the expected size if that is wrong."""
    size = human_bytes(file.expected_size) if file.expected_size not in (None, file.size) else ""
    return " ".join(part for part in ((file.expected_sum or "")[:SUM_SHOWN], size) if part)


def _speed(file: FileReport) -> str:
    if not file.bytes_per_second or file.size is None or file.size < LEAST_TIMED_BYTES:
        return ""
    return f"{human_bytes(file.bytes_per_second)}/s"


@contextmanager
def hashing_bars() -> Iterator[Callable[[Path, int, int], None]]:
    """Show a bar per file on stderr while it is read; silent if stderr is not a terminal."""
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    tasks: dict[Path, TaskID] = {}
    with live_progress(*columns) as bars:

        def progress(path: Path, done: int, total: int) -> None:
            if path not in tasks:
                tasks[path] = bars.add_task(printable(path.name), total=total)
            bars.update(tasks[path], completed=done)

        yield progress


def print_comparison(comparison: "Comparison", *, as_json: bool) -> None:
    """Print "identical", or what differs: params, tokenizer, and the first tensors."""
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


def _differences(comparison: "Comparison") -> Table:
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
