"""What `llama-ref lens` prints."""

import json
from typing import Any

from rich.table import Table
from rich.text import Text

from llama_ref.cli.terminal import print_rich
from llama_ref.cli.views.study.shared import (
    cut,
    elastic,
    new_table,
    number,
    percent,
    plain,
    point_name,
    prompt,
    say,
    token_json,
    tokens_json,
)
from llama_ref.study.analyses.logit_lens import Followed, LogitLens, block_ends
from llama_ref.study.inputs import label
from llama_ref.tokenizer import Tokenizer


def print_lens(lens: LogitLens, tokenizer: Tokenizer, *, as_json: bool) -> None:
    """Print each layer's prediction after the last token; as JSON, each point's after every token."""
    if as_json:
        print(json.dumps(_lens_json(lens, tokenizer), indent=2))
        return
    print_rich(prompt(lens.tokens[: lens.positions[-1] + 1], tokenizer))
    print_rich(_lens_table(lens, tokenizer))
    how = "translated by the tuned lens, then read" if lens.is_tuned else "read"
    within = "" if lens.is_tuned else ", and points within layers"
    say(
        f"After the last token, {how} through the final norm and the output matrix. Entropy and KL in nats; KL: to the"
        f" model's own prediction. --json has all positions{within}."
    )
    if lens.followed is not None:
        say(_when_first(lens, lens.followed, label(tokenizer, lens.followed.token)), "green")


def _lens_table(lens: LogitLens, tokenizer: Tokenizer) -> Table:
    followed = lens.followed
    heads: list[str | Text] = [] if followed is None else [Text(cut(label(tokenizer, followed.token))), "rank"]
    table = new_table("after", *heads, "entropy", "KL")
    table.add_column("likeliest next")
    last = lens.top_ids[-1, -1, 0]
    for p in block_ends(lens.points):
        target = [] if followed is None else [percent(followed.probability[p, -1]), _rank_cell(followed, p)]
        top = zip(lens.top_ids[p, -1].tolist(), lens.top_probabilities[p, -1].tolist(), strict=True)
        style = "bold" if lens.top_ids[p, -1, 0] == last else ""
        best = elastic("  ".join(f"{cut(label(tokenizer, token))} {percent(share)}" for token, share in top), style)
        table.add_row(point_name(lens.points[p]), *target, number(lens.entropy[p, -1]), number(lens.kl[p, -1]), best)
    return table


def _rank(followed: Followed, p: int, t: int) -> int | None:
    """Return the target's rank, or None if its probability is NaN."""
    return None if followed.probability[p, t].isnan() else int(followed.rank[p, t])


def _rank_cell(followed: Followed, p: int) -> str:
    rank = _rank(followed, p, -1)
    return "–" if rank is None else f"{rank:,}"


def _when_first(lens: LogitLens, followed: Followed, target: str) -> str:
    """Name the layer from which on the target is the most likely token, in a sentence."""
    ranks = [(point_name(lens.points[p]), _rank(followed, p, -1)) for p in block_ends(lens.points)]
    last, share = ranks[-1][1], percent(followed.probability[-1, -1])
    if last is None:
        return "The model's numbers are not finite: look for NaN in its weights (llama-ref verify --deep)."
    if last > 1:
        return f"{target} ends at rank {last:,}, with {share}."
    stays = next(i for i in range(len(ranks)) if all(rank == 1 for _, rank in ranks[i:]))
    return f"{target} is the likeliest from {ranks[stays][0]} on and ends with {share}."


def _lens_json(lens: LogitLens, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokens": tokens_json(lens.tokens, tokenizer),
        "tuned": lens.is_tuned,
        "target": None if lens.target is None else token_json(lens.target, tokenizer),
        "points": [
            {"point": point, "positions": [_reading_json(lens, p, t, tokenizer) for t in range(len(lens.positions))]}
            for p, point in enumerate(lens.points)
        ],
    }


def _reading_json(lens: LogitLens, p: int, t: int, tokenizer: Tokenizer) -> dict[str, Any]:
    followed = lens.followed
    top = zip(lens.top_ids[p, t].tolist(), plain(lens.top_probabilities[p, t]), strict=True)
    return {
        "position": lens.positions[t],
        "entropy": plain(lens.entropy[p, t]),
        "kl": plain(lens.kl[p, t]),
        "target_probability": None if followed is None else plain(followed.probability[p, t]),
        "target_rank": None if followed is None else _rank(followed, p, t),
        "top": [token_json(token, tokenizer) | {"probability": share} for token, share in top],
    }
