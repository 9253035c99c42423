"""What `llama-ref bench` prints: tables of at most 80 columns, or JSON."""

import json
import textwrap
from dataclasses import asdict

from rich import box
from rich.table import Table
from rich.text import Text

from llama_ref.bench.results import LongResult, Report, Result, Spread
from llama_ref.cli.terminal import print_rich
from llama_ref.formatting import human_bytes, printable

WIDTH = 80


def print_report(report: Report, *, as_json: bool) -> None:
    """Print a benchmark: tables, or JSON in seconds, bytes and tokens per second."""
    if as_json:
        print(json.dumps(asdict(report), indent=2))
        return
    for line in _head(report):
        print(printable(line))
    print_rich(_prefill_table(report))
    print_rich(_decode_table(report))
    if report.long_results:
        print_rich(_long_table(report.long_results))
    for line in _foot(report):
        print(textwrap.fill(printable(line), WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False))


def _head(report: Report) -> list[str]:
    machine, settings = report.machine, report.settings
    on = "" if machine.device == "cpu" else f", {machine.device}"
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    held = {r.contestant: max(o.peak_bytes for o in report.results if o.contestant == r.contestant) for r in report.results}
    precisions = {result.contestant: result.precision for result in report.results}
    lines = [
        f"{machine.cpu}, {machine.cores} cores, {machine.system}{on}; {settings.threads} threads",
        versions,
        "; ".join(f"{name}: {precision}, {human_bytes(held[name])} of memory" for name, precision in precisions.items()),
        f"{settings.prompt_len} tokens in, {settings.gen_len} out, greedy; medians of {settings.rounds} alternating rounds",
    ]
    if report.bandwidth:
        lines.append(f"memory read at {report.bandwidth.median / 1e9:.1f} GB/s {_range(report.bandwidth, 1e-9)}")
    return [part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent="    ")]


def _prefill_table(report: Report) -> Table:
    table = _table("prefill", "tokens/s", "first s", "ours/theirs", "matmul")
    for result in report.results:
        table.add_row(
            *_contestant(result),
            _figure(result.prefill),
            f"{result.first_token.median:.3f}",
            _ratio(result.prefill_ratio),
            _percent(result.matmul_fraction),
        )
    return table


def _decode_table(report: Report) -> Table:
    table = _table("decode", "tokens/s", "ours/theirs", "MB/token", "bandwidth")
    for result in report.results:
        table.add_row(
            *_contestant(result),
            _figure(result.decode),
            _ratio(result.decode_ratio),
            _megabytes(result.bytes_per_token),
            _percent(result.bandwidth_fraction),
        )
    return table


def _long_table(results: list[LongResult]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("context", "tokens/s", "ms/token", "MB/token", "K/V MB", "bandwidth", "growth"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            f"{result.context:,}",
            _figure(result.decode),
            f"{1e3 / result.decode.median:.1f}",
            _megabytes(result.work.bytes),
            _megabytes(result.kv_bytes),
            _percent(result.bandwidth_fraction),
            _percent(result.growth_fraction),
        )
    return table


def _foot(report: Report) -> list[str]:
    context = (
        "Context: tokens before the decoded ones; their keys and values are random numbers. Growth: share of the memory"
        " bandwidth that reads the additional K/V bytes in the additional time over the shortest context."
    )
    return [
        "Tokens/s: all sequences together; in parentheses, the slowest and fastest round. Ratios: per round. First s: seconds"
        " to the first token. Matmul: share of the prefill's time that its matrix products take alone. MB/token: weights, keys"
        " and values read per token. Bandwidth: share of the memory bandwidth that this uses. Memory: the peak, including"
        " mapped files.",
        *([context] if report.long_results else []),
        *(f"note: {note}" for note in report.notes),
        f"to repeat: {report.command}",
    ]


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(title, no_wrap=True)
    for column in ("batch", *columns):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _contestant(result: Result) -> tuple[Text, str]:
    return Text(result.contestant), str(result.batch)


def _figure(spread: Spread) -> str:
    return f"{_short(spread.median)} {_range(spread)}"


def _megabytes(n: float) -> str:
    return f"{n / 1e6:,.0f}" if n >= 1e7 else f"{n / 1e6:.2f}"


def _range(spread: Spread, scale: float = 1.0) -> str:
    return f"({_short(spread.low * scale)}–{_short(spread.high * scale)})"


def _ratio(spread: Spread | None) -> str:
    return f"{_times(spread.median)} ({_times(spread.low)}–{_times(spread.high)})" if spread else ""


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.0%}"


def _short(value: float) -> str:
    if value < 100:
        return f"{value:.1f}"
    return f"{value:.0f}" if value < 10_000 else f"{value / 1000:.1f}k"
