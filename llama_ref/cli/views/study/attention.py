"""What `llama-ref attention` prints."""

import json
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import Tensor

from llama_ref.cli.terminal import print_rich
from llama_ref.cli.views.study.shared import cut, elastic, new_table, number, percent, plain, prompt, say, tokens_json
from llama_ref.study.analyses.attention import REPEATED_TOKENS, AttentionSummary
from llama_ref.study.inputs import label
from llama_ref.tokenizer import Tokenizer

LOOKED_AT = 5  # tokens shown per query
MEASURES = ("sink", "previous", "induction", "entropy")


def print_attention(summary: AttentionSummary, tokenizer: Tokenizer, layer: int | None = None, *, as_json: bool) -> None:
    """Print where heads look: a line per layer, or per head of one layer; as JSON, every head."""
    layers = range(len(summary.sink)) if layer is None else [layer]
    if as_json:
        heads = [{"layer": i, "heads": [_head_json(summary, i, h) for h in range(summary.sink.shape[1])]} for i in layers]
        print(json.dumps({"tokens": tokens_json(summary.tokens, tokenizer), "layers": heads}, indent=2))
        return
    print_rich(prompt(summary.tokens, tokenizer))
    print_rich(_layers_table(summary) if layer is None else _heads_table(summary, layer))
    say(
        "Sink: attention to the first token. Previous: to the token before. Entropy in nats. Induction: on"
        f" {REPEATED_TOKENS} random tokens, repeated once, attention to what followed the first time."
    )
    if layer is None:
        say("Each layer: the mean over its heads, and the highest head (entropy: lowest). --layer shows all.")


def print_pattern(
    pattern: Tensor, tokens: Sequence[int], tokenizer: Tokenizer, layer: int, head: int, *, as_json: bool
) -> None:
    """Print the tokens that one head attends to most, for every token; as JSON, all weights."""
    if as_json:
        found = {"tokens": tokens_json(tokens, tokenizer), "layer": layer, "head": head, "pattern": plain(pattern)}
        print(json.dumps(found, indent=2))
        return
    labels = [cut(label(tokenizer, token)) for token in tokens]
    print_rich(Text(f"layer {layer}, head {head}"))
    table = new_table("from")
    table.add_column("looks at")
    for t, row in enumerate(pattern):
        most = row[: t + 1].topk(min(LOOKED_AT, t + 1))
        seen = zip(most.indices.tolist(), most.values.tolist(), strict=True)
        at = "  ".join(f"{labels[s]}@{s} {percent(share)}" for s, share in seen if share >= 0.005)
        table.add_row(Text(f"{labels[t]}@{t}"), elastic(at))
    print_rich(table)


def _layers_table(summary: AttentionSummary) -> Table:
    table = new_table("layer", *MEASURES)
    for layer in range(len(summary.sink)):
        cells = [_with_best(getattr(summary, measure)[layer], least=measure == "entropy") for measure in MEASURES]
        table.add_row(str(layer), *cells)
    return table


def _with_best(heads: Tensor, *, least: bool) -> str:
    """A layer's mean, and the head with the largest or smallest value."""
    if heads.isnan().all():
        return "–"
    best = int(heads.argmin() if least else heads.argmax())
    return f"{number(heads.mean())} (h{best} {number(heads[best])})"


def _heads_table(summary: AttentionSummary, layer: int) -> Table:
    table = new_table("head", *MEASURES)
    for head in range(summary.sink.shape[1]):
        table.add_row(str(head), *(number(getattr(summary, measure)[layer, head]) for measure in MEASURES))
    return table


def _head_json(summary: AttentionSummary, layer: int, head: int) -> dict[str, Any]:
    return {"head": head} | {measure: plain(getattr(summary, measure)[layer, head]) for measure in MEASURES}
