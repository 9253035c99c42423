"""What `llama-ref evaluate` prints."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from rich import box
from rich.table import Column, Table
from rich.text import Text

from llama_ref.cli.terminal import print_rich
from llama_ref.evaluation.harness.run import EvaluationSettings
from llama_ref.formatting import printable

KEPT = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better")  # of the results


def print_results(results: Mapping[str, Any], model: str, settings: EvaluationSettings, *, as_json: bool) -> None:
    """Print the scores of each task: a table, or JSON under the harness's own names."""
    harness = version("lm-eval")
    if as_json:
        kept = {name: results[name] for name in KEPT if name in results}
        print(json.dumps({"model": model, "lm_eval": harness, "settings": asdict(settings), **kept}, indent=2, default=str))
        return
    left, right = ("task", "metric"), ("score", "±", "shots", "documents")
    columns = [Column(name, overflow="fold") for name in left] + [Column(name, justify="right", no_wrap=True) for name in right]
    table = Table(*columns, box=box.SIMPLE_HEAD)
    for row in _rows(results):
        table.add_row(*map(Text, row))
    print_rich(table)
    limit = f", the first {settings.limit:,} documents of each task" if settings.limit is not None else ""
    chat = ", as chats" if settings.chat else ""
    print(printable(f"{model}{chat}{limit}; lm-evaluation-harness {harness}"))


def _rows(results: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Name, metric, score, standard error, shots and documents of every score."""
    for task, found in results["results"].items():
        shown = str(found.get("alias", task))
        for key, value in found.items():
            metric, _, chosen = key.partition(",")
            if not isinstance(value, int | float) or not chosen or metric.endswith("_stderr"):
                continue
            name = metric if chosen == "none" else f"{metric} ({chosen})"
            error = found.get(f"{metric}_stderr,{chosen}")
            documents = results.get("n-samples", {}).get(task, {}).get("effective", "")
            yield (
                shown,
                name,
                f"{value:.4f}",
                f"{error:.4f}" if isinstance(error, float) else "",
                str(results.get("n-shot", {}).get(task, "")),
                f"{documents:,}" if isinstance(documents, int) else "",
            )
