"""Draw a roofline plot: speed against operations per byte read, below the machine's limits."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llama_ref.bench.results import Report, Result, Spread, Work
from llama_ref.errors import RequestError
from llama_ref.pictures import check_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^"  # one per contestant
LINE = 0.035  # height of a text line, as a share of the picture's
ENDINGS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Point:
    """One measurement; `rate` is tokens per second of all sequences together."""

    series: str
    label: str
    work: Work
    rate: Spread
    is_prefill: bool = False

    @property
    def intensity(self) -> float:
        """Operations per byte read."""
        return self.work.flops / self.work.bytes

    @property
    def height(self) -> float:
        """Billions of operations per second."""
        return self.work.flops * self.rate.median / 1e9


def check_picture(path: str | Path) -> None:
    """Raise RequestError if a picture cannot be written to `path`; call it before measuring."""
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        raise RequestError(f"png is {str(path)!r}, expected a file that ends in {', '.join(ENDINGS)}")
    if not path.absolute().parent.is_dir():
        raise RequestError(f"png is {str(path)!r}, but there is no folder {path.absolute().parent}: make it first")
    check_matplotlib()


def draw_roofline(report: Report, path: str | Path) -> None:
    """Draw prefill and decode of all contestants, batches and contexts, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.add_subplot()
    points = list(_points(report))
    left, right = min(p.intensity for p in points) / 2, max(p.intensity for p in points) * 3
    low, high = min(p.height for p in points) / 3, max([*(p.height for p in points), _peak(report) or 0]) * 2
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high))
    _draw_roof(axes, report, left, right)
    series = dict.fromkeys(p.series for p in points)
    colors = {name: f"C{i}" for i, name in enumerate(series)}
    for name, marker in zip(series, MARKERS, strict=False):
        _draw_series(axes, name, [p for p in points if p.series == name], marker, colors[name])
    for is_prefill in (False, True):
        _name_points(axes, [p for p in points if p.is_prefill == is_prefill], colors)
    axes.set_xlabel("operations per byte read (weights, keys, values)")
    axes.set_ylabel("billions of operations per second")
    axes.set_title(
        f"{report.machine.cpu}, {report.settings.threads} threads; filled: decode, hollow: prefill of "
        f"{report.settings.prompt_len:,}; named: tokens per second",
        fontsize=9,
    )
    axes.grid(which="both", alpha=0.2)
    axes.legend(loc="lower right", fontsize=8)
    for axis in (axes.xaxis, axes.yaxis):  # 1,000, not 10³
        axis.set_major_formatter("{x:,g}")
    figure.savefig(path, dpi=150)


def _points(report: Report) -> Iterator[Point]:
    for result in report.results:
        yield Point(_series(result), f"batch {result.batch}", result.prefill_work, result.prefill, is_prefill=True)
        yield Point(_series(result), f"batch {result.batch}", result.decode_work, result.decode)
    for long in report.long_results:
        yield Point(_series(report.results[0]), f"context {long.context:,}", long.work, long.decode)


def _series(result: Result) -> str:
    return f"{result.contestant} ({result.precision})"


def _peak(report: Report) -> float | None:
    """The highest speed of matrix products alone, in billions of operations per second."""
    found = [result.matmul_flops / 1e9 for result in report.results if result.matmul_flops]
    return max(found, default=None)


def _draw_roof(axes: "Axes", report: Report, left: float, right: float) -> None:
    peak, ends = _peak(report), [left, right]
    if report.bandwidth:
        speed = report.bandwidth.median / 1e9
        ridge = min(right, peak / speed) if peak else right  # beyond it, memory is no longer the limit
        axes.plot([left, ridge], [left * speed, ridge * speed], color="black", label=f"memory read at {speed:.1f} GB/s")
        ends = [ridge, right]
    if peak:
        label = f"matrix products alone, {peak:,.0f} billion per second"
        axes.plot(ends, [peak, peak], color="black", linestyle="--", label=label)


def _draw_series(axes: "Axes", name: str, own: list[Point], marker: str, color: str) -> None:
    for point in own:
        low, high = (point.work.flops * rate / 1e9 for rate in (point.rate.low, point.rate.high))
        axes.errorbar(
            [point.intensity],
            [point.height],
            yerr=[[point.height - low], [high - point.height]],
            fmt=marker,
            capsize=3,
            color=color,
            markerfacecolor="white" if point.is_prefill else color,
            label=name if point is own[-1] else None,
        )


def _name_points(axes: "Axes", points: list[Point], colors: dict[str, str]) -> None:
    """Label the points: decode in a column on the right, prefill in a column at the bottom."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    below, line = points[0].is_prefill, (high / low) ** LINE
    x = min(p.intensity for p in points) if below else max(p.intensity for p in points) * (right / left) ** 0.06
    y = min(p.height for p in points) / line if below else 0.0
    for point in sorted(points, key=lambda p: p.height, reverse=below):
        y = y / line if below else max(point.height, y * line)
        rate = f"{point.rate.median:,.1f}" if point.rate.median < 100 else f"{point.rate.median:,.0f}"
        axes.annotate(
            f"{point.series.split(' (')[0]}, {point.label}: {rate}",
            (point.intensity, point.height),
            (x, y),
            arrowprops={"arrowstyle": "-", "color": colors[point.series], "lw": 0.3},
            color=colors[point.series],
            fontsize=7.5,
            va="center",
        )
