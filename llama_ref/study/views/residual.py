"""What a command on the residual stream prints: how long it grows, and how it turns."""

import json
from typing import Any

import torch
from rich.table import Table

from llama_ref.study.residual import ResidualStream
from llama_ref.study.views.shared import block_ends, new_table, number, plain, prompt, say, tokens_json
from llama_ref.terminal import print_rich
from llama_ref.tokenizer import Tokenizer

MEASURES = ("norm", "drift", "to_last")


def print_norms(stream: ResidualStream, tokenizer: Tokenizer, *, as_json: bool) -> None:
    """The stream's length and direction after each layer: of the first token, and the others' median; as JSON, of all."""
    if as_json:
        print(json.dumps(_stream_json(stream, tokenizer), indent=2))
        return
    print_rich(prompt(stream.tokens, tokenizer))
    print_rich(_stream_table(stream))
    say(
        "Length: Euclidean. Drift: the cosine with half a layer before; to last: with what the model ends with. Of the others"
        " the median; the first token, where heads look that find nothing, may grow far longer than they do."
    )


def _stream_table(stream: ResidualStream) -> Table:
    table = new_table("after", "first: length", "drift", "to last", "others: length", "drift", "to last")
    for p, name in block_ends(stream.points):
        rows = [getattr(stream, measure)[p] for measure in MEASURES]  # (T,) each
        others = [row[1:].median() if len(row) > 1 else torch.nan for row in rows]
        table.add_row(name, *map(number, [*(row[0] for row in rows), *others]))
    return table


def _stream_json(stream: ResidualStream, tokenizer: Tokenizer) -> dict[str, Any]:
    points = [
        {"point": point} | {measure: plain(getattr(stream, measure)[p]) for measure in MEASURES}
        for p, point in enumerate(stream.points)
    ]
    return {"tokens": tokens_json(stream.tokens, tokenizer), "points": points}
