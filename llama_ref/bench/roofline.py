"""The roofline of decoding as a picture: what a token reads, how many come a second, and what memory allows."""

import importlib.util
from pathlib import Path

from llama_ref.bench.figures import Report
from llama_ref.errors import RequestError

MARKERS = "osD^"
LINE = 0.035  # of the picture's height
ENDINGS = (".png", ".svg", ".pdf")


def check_picture(path: str | Path) -> None:
    """Raise RequestError where none could be drawn: better before measuring than after."""
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        raise RequestError(f"png is {str(path)!r}, expected a file that ends in {', '.join(ENDINGS)}")
    if not path.absolute().parent.is_dir():
        raise RequestError(f"png is {str(path)!r}, but there is no folder {path.absolute().parent}: make it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("--png needs matplotlib, which is not installed: pip install matplotlib, or leave --png out")


def draw_roofline(report: Report, path: str | Path) -> None:
    """Points of all contestants and batches under the line of the measured bandwidth, both axes logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    points = [(result.bytes_per_token / 1e6, result.decode.median, result) for result in report.results]
    left, right = min(x for x, _, _ in points) / 4, max(x for x, _, _ in points) * 2  # names stand on the left
    if report.bandwidth:
        speed = report.bandwidth.median / 1e6  # MB/s
        axes.plot([left, right], [speed / left, speed / right], color="black", label=f"memory read at {speed / 1e3:.1f} GB/s")
    names = list(dict.fromkeys(result.contestant for result in report.results))
    for i, name in enumerate(names):
        own = [(x, y, result) for x, y, result in points if result.contestant == name]
        label = f"{name} ({own[0][2].precision})"
        spread = [[y - r.decode.low for _, y, r in own], [r.decode.high - y for _, y, r in own]]
        axes.errorbar(
            [x for x, _, _ in own], [y for _, y, _ in own], yerr=spread, fmt=MARKERS[i % len(MARKERS)], capsize=3, label=label
        )
    low, high = min(y for _, y, _ in points) / 3, max(y for _, y, _ in points) * 4
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high))
    below = 0.0
    for x, y, result in sorted(points, key=lambda point: point[1]):
        below = max(y, below * (high / low) ** LINE)  # or the names of two that are as fast would stand in one place
        text, line = f"{result.contestant}, batch {result.batch}: {y:.1f}", {"arrowstyle": "-", "color": "gray", "lw": 0.5}
        axes.annotate(text, (x, y), (x / (right / left) ** 0.03, below), arrowprops=line, fontsize=8, ha="right", va="center")
    axes.set_xlabel("MB read per token (weights, keys, values)")
    axes.set_ylabel("tokens per second")
    axes.set_title(f"Decoding on {report.machine.cpu}, {report.settings.threads} threads", fontsize=11)
    axes.grid(which="both", alpha=0.2)
    axes.legend(loc="upper right", fontsize=8)
    for axis in (axes.xaxis, axes.yaxis):  # 1,000, not 10³
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter(NullFormatter())
    figure.savefig(path, dpi=150)
