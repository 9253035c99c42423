"""What `llama-ref norms` prints."""

import json
from typing import Any

from rich.table import Table

from llama_ref.cli.terminal import print_rich
from llama_ref.cli.views.study.shared import new_table, number, plain, point_name, prompt, say, tokens_json
from llama_ref.study.analyses.logit_lens import block_ends
from llama_ref.study.analyses.residual import ResidualStream, quartiles_of_others
from llama_ref.tokenizer import Tokenizer

MEASURES = ("norm", "drift", "to_last")


def print_norms(stream: ResidualStream, tokenizer: Tokenizer, *, as_json: bool) -> None:
    """Print the stream's norm and direction per layer: first token, median of the others."""
    if as_json:
        print(json.dumps(_stream_json(stream, tokenizer), indent=2))
        return
    print_rich(prompt(stream.tokens, tokenizer))
    print_rich(_stream_table(stream))
    say(
        "Length: Euclidean norm. Drift: cosine with the point half a layer before. To last: cosine with the last point."
        " Others: the median; the first token, an attention sink, may be far longer."
    )


def _stream_table(stream: ResidualStream) -> Table:
    names = ("length", "drift", "to last")
    table = new_table("after", *(f"{tokens}\n{name}" for tokens in ("first:", "others:") for name in names))
    measured = [getattr(stream, measure) for measure in MEASURES]  # (P, T) each
    medians = [quartiles_of_others(values)[1] for values in measured]  # (P,) each
    for p in block_ends(stream.points):
        shown = [*(values[p, 0] for values in measured), *(median[p] for median in medians)]
        table.add_row(point_name(stream.points[p]), *map(number, shown))
    return table


def _stream_json(stream: ResidualStream, tokenizer: Tokenizer) -> dict[str, Any]:
    points = [
        {"point": point} | {measure: plain(getattr(stream, measure)[p]) for measure in MEASURES}
        for p, point in enumerate(stream.points)
    ]
    return {"tokens": tokens_json(stream.tokens, tokenizer), "points": points}
